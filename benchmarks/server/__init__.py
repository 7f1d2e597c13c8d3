"""What a server of `serve` reaches beside the same session within the process."""
