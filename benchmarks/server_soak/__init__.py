"""A server under everything at once, for as long as one likes: every answer is checked, and its memory is watched."""
