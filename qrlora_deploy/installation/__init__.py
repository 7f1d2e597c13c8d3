"""Which parts of the project are installed, and what to say where one is missing."""
