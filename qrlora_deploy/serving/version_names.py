"""Names of a customer's versions: when each came, and the begin of its content's hash."""

import hashlib
import re
import time
from collections.abc import Sequence

VERSION_NAME = re.compile(r"\d{14}-[0-9a-f]{16}", re.ASCII)
"""Milliseconds since 1970, so that names rise with time, and a hash."""


def hash_of(content: bytes) -> str:
    """What stands for a content in the name of its version."""
    return hashlib.sha256(content).hexdigest()[:16]


def hash_in(name: str) -> str:
    """Of the version's content."""
    return name.partition("-")[2]


def next_name(content: bytes, names: Sequence[str]) -> str:
    """A name behind those that are there, the newest first, also where the clock was set back."""
    after = int(names[0].partition("-")[0]) + 1 if names else 0
    return f"{max(time.time_ns() // 10**6, after):014d}-{hash_of(content)}"
