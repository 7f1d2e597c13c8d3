"""Files and texts from outside: strict readers, atomic outputs, temporary folders."""
