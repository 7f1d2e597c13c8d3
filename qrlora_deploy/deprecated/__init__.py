"""What an older release offered and this one still understands, with a warning."""
