"""Rendezvous hashing: which of several places a key belongs to, without a table that all would have to share.

Every place has a weight for a key, and the heaviest one has it. Where a place goes, only its keys move; where one
comes, only the keys that it gets. The weights are the same in every process, machine and version of Python.
"""

from collections.abc import Iterable
from hashlib import blake2b


def ranked(key: str, places: Iterable[str]) -> list[str]:
    """All places, the one that has the key first, then those that have it where the ones before are gone or busy.

    Args:
        key: such as a customer.
        places: names, each one once; their order does not matter.
    """
    start = key.encode("utf-8", "surrogatepass")
    return sorted(places, key=lambda place: (_weight(start, place), place), reverse=True)


def _weight(key: bytes, place: str) -> bytes:
    # The length keeps apart "ab" at "c" and "a" at "bc".
    return blake2b(b"%d:%s%s" % (len(key), key, place.encode("utf-8", "surrogatepass")), digest_size=8).digest()
