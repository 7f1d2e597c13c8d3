"""Which names a listing showed, in eight bytes each."""

import hashlib
from collections.abc import Iterable

import numpy as np

HASH_BYTES = 8


class Names:
    """Names that are looked up by their hashes: of a hundred thousand, 0.8 MB.

    Two names with one hash are taken for each other, which costs a question to the store and no more.

    Args:
        parts: hashes of names, `[n]` uint64 each, as `hashes_of` makes them.
    """

    def __init__(self, parts: Iterable[np.ndarray] = ()) -> None:
        self._hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *parts]))

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, name: str) -> bool:
        wanted = hashes_of([name])
        place = int(np.searchsorted(self._hashes, wanted[0]))
        return place < len(self._hashes) and self._hashes[place] == wanted[0]


def hashes_of(names: Iterable[str]) -> np.ndarray:
    """The hashes `[n]` uint64 of names."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=HASH_BYTES).digest() for name in names)
    return np.frombuffer(digests, np.uint64)
