"""What a server has done in the last minutes, for a person who looks."""
