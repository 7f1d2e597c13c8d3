"""How many directions of a pivoted QR are kept."""
