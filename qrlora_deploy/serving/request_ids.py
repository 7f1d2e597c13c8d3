"""Names for requests whose clients give none: unlike each other, also of many processes, and no secret."""

import random

_random = random.Random()
"""Seeded by the system's randomness when the process starts; asking the system for each takes longer than the rest."""


def new_request_id() -> str:
    """16 hexadecimal digits."""
    return f"{_random.getrandbits(64):016x}"
