"""The ids of very many customers, found by name: about 35 bytes each, where a dictionary takes some 190.

The ids lie end to end in one piece of memory. Each has a fingerprint of 32 bits: the id, read as one
large number, modulo a prime that is drawn at random when the process starts, so that nobody can
choose ids that share one (Karp and Rabin, "Efficient randomized pattern-matching algorithms", 1987),
times an odd number. Fingerprint and place make a key, and the keys are sorted; a look-up finds the
keys of its fingerprint through a table of their first bits and compares the ids themselves.
"""

import random
from collections.abc import Iterator, Sequence

import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.coefficients import CUSTOMER_ID, MAX_ID_CHARACTERS
from qrlora_deploy.formats.customer_files import check_customer_id

CODE_BITS = 32
PLACE = np.uint64(2**CODE_BITS - 1)
"""The low half of a key: the place of the id; the high half is its fingerprint."""

MOST_IDS = 2**31 - 1
CHUNK = 2**16
"""Ids that are worked on together: few enough for a processor's cache."""

FIRST = np.array([bool(CUSTOMER_ID.fullmatch(chr(byte))) for byte in range(256)])
LATER = np.array([bool(CUSTOMER_ID.fullmatch(f"a{chr(byte)}")) for byte in range(256)])
"""Which bytes an id may begin with, and which may follow."""


def _is_prime(number: int) -> bool:
    """Miller and Rabin's test, whose four bases decide every number of 32 bits."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7):
        power = pow(base, odd, number)
        if power not in (1, number - 1) and all(
            (power := power * power % number) != number - 1 for _ in range(twos - 1)
        ):
            return False
    return True


def _random_prime() -> int:
    source = random.SystemRandom()
    while not _is_prime(number := source.randrange(3 * 2**30 + 1, 2**CODE_BITS, 2)):
        pass
    return number


PRIME = _random_prime()
MIX = random.SystemRandom().randrange(1, 2**CODE_BITS, 2)
"""Ids that are counted on have remainders in small groups; times an odd number, modulo 2^32, these are spread
and remain different."""


class IdIndex:
    """Ids and their places `0 .. n - 1`, which are their order.

    Args:
        lengths: `[n]` uint8, characters of each id.
        text: the ids end to end, `sum(lengths)` bytes.

    Raises:
        InputError: an id is none or occurs twice, there are none or too many, or the lengths do not
            fit the text.
    """

    def __init__(self, lengths: np.ndarray, text: bytes) -> None:
        if not 0 < len(lengths) <= MOST_IDS:
            raise InputError(f"there are {len(lengths)} customers, not 1 to {MOST_IDS}")
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        if lengths.min() == 0 or lengths.max() > MAX_ID_CHARACTERS or offsets[-1] != len(text):
            raise InputError("the lengths of the customers' ids make no sense")
        # Half the memory, as long as the text is shorter than 4 GB.
        self._offsets = offsets if offsets[-1] >= 2**32 else offsets.astype(np.uint32)
        self._text = text
        _check_ids(offsets, text)
        self._keys = np.sort(_fingerprints(offsets, text) << CODE_BITS | np.arange(len(lengths), dtype=np.uint64))
        self._shift = CODE_BITS - len(lengths).bit_length()
        first_bits = (self._keys >> np.uint64(CODE_BITS + self._shift)).astype(np.int64)
        self._starts = np.zeros((2**CODE_BITS >> self._shift) + 1, dtype=np.uint32)
        np.cumsum(np.bincount(first_bits, minlength=len(self._starts) - 1), out=self._starts[1:])
        # A plain look-up reads single numbers, for which numpy takes several times as long.
        self._views = self._starts.data, self._keys.data, self._offsets.data
        self._check_twice()

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def size_bytes(self) -> int:
        """Memory of the index."""
        return len(self._text) + self._offsets.nbytes + self._keys.nbytes + self._starts.nbytes

    def find(self, name: str) -> int | None:
        """The place of `name`, or None."""
        if len(name) > MAX_ID_CHARACTERS:
            return None
        # What is not ASCII becomes a question mark, which is in no id.
        wanted = name.encode("ascii", "replace")
        code = int.from_bytes(wanted, "big") % PRIME * MIX & 0xFFFFFFFF
        starts, keys, offsets = self._views
        bucket = code >> self._shift
        for position in range(starts[bucket], starts[bucket + 1]):
            key = keys[position]
            if key >> CODE_BITS == code:
                place = key & 0xFFFFFFFF
                if self._text[offsets[place] : offsets[place + 1]] == wanted:
                    return place
        return None

    def name(self, place: int) -> str:
        """The id at a place."""
        return self._text[int(self._offsets[place]) : int(self._offsets[place + 1])].decode("ascii")

    def names(self) -> Iterator[str]:
        """All ids in order."""
        ends = self._offsets.data
        for place in range(len(self)):
            yield self._text[ends[place] : ends[place + 1]].decode("ascii")

    def places_in(self, other: "IdIndex") -> np.ndarray:
        """`[n]` int64: the place of each id in `other`, -1 where it is not there."""
        found = np.full(len(self), -1, dtype=np.int64)
        theirs = other._keys >> np.uint64(CODE_BITS)
        for start in range(0, len(self), CHUNK):
            keys = self._keys[start : start + CHUNK]
            codes = keys >> np.uint64(CODE_BITS)
            first, stop = np.searchsorted(theirs, codes), np.searchsorted(theirs, codes, side="right")
            while (rows := np.flatnonzero(first < stop)).size:
                mine = (keys[rows] & PLACE).astype(np.int64)
                candidates = (other._keys[first[rows]] & PLACE).astype(np.int64)
                same = _same_ids(self, mine, other, candidates)
                found[mine[same]] = candidates[same]
                first[rows] += 1
        return found

    def _check_twice(self) -> None:
        """Only ids of one fingerprint can be equal; of ten million some twenty thousand share theirs by chance."""
        codes = self._keys >> np.uint64(CODE_BITS)
        again = np.flatnonzero(codes[1:] == codes[:-1]) + 1
        seen: set[str] = set()
        before = -1
        for position in again.tolist():
            if position != before + 1:
                seen = {self.name(int(self._keys[position - 1] & PLACE))}
            name = self.name(int(self._keys[position] & PLACE))
            if name in seen:
                raise InputError(f"the customer {name} occurs twice")
            seen.add(name)
            before = position


def encode_ids(names: "Sequence[str] | np.ndarray") -> tuple[np.ndarray, bytes]:
    """Lengths `[n]` uint8 and text of ids, given as text or, much faster, as an array of bytes.

    Raises:
        InputError: an id is none.
    """
    if isinstance(names, np.ndarray):
        lengths = np.strings.str_len(names)
        if lengths.max(initial=0) > MAX_ID_CHARACTERS:
            check_customer_id(names[lengths.argmax()].decode("latin-1"))
        characters = np.ascontiguousarray(names).view(np.uint8).reshape(len(names), -1)
        text = characters[np.arange(characters.shape[1]) < lengths[:, None]].tobytes()
        return lengths.astype(np.uint8), text
    for name in names:
        check_customer_id(name)
    return np.array([len(name) for name in names], dtype=np.uint8), "".join(names).encode("ascii")


def _check_ids(offsets: np.ndarray, text: bytes) -> None:
    """As `check_customer_id`, for all of them."""
    characters = np.frombuffer(text, dtype=np.uint8)
    for start in range(0, len(offsets) - 1, CHUNK):
        ends = offsets[start : start + CHUNK + 1]
        part = characters[ends[0] : ends[-1]]
        wrong = ~LATER[part]
        wrong[ends[:-1] - ends[0]] = ~FIRST[part[ends[:-1] - ends[0]]]
        if wrong.any():
            place = int(np.searchsorted(ends, ends[0] + wrong.argmax(), side="right")) - 1
            check_customer_id(text[ends[place] : ends[place + 1]].decode("latin-1"))


def _fingerprints(offsets: np.ndarray, text: bytes) -> np.ndarray:
    """`[n]` uint64, below 2^32: each id, read as a number whose first byte is the highest, modulo the prime, mixed."""
    characters = np.frombuffer(text, dtype=np.uint8)
    codes = np.zeros(len(offsets) - 1, dtype=np.uint64)
    for start in range(0, len(codes), CHUNK):
        begins = offsets[start : start + CHUNK + 1]
        lengths = np.diff(begins)
        part = codes[start : start + CHUNK]
        for length in np.unique(lengths).tolist():
            rows = np.flatnonzero(lengths == length)
            remainders = _remainders(_windows(characters, length)[begins[rows]])
            part[rows] = remainders * np.uint64(MIX) & PLACE
    return codes


def _remainders(ids: np.ndarray) -> np.ndarray:
    """`ids [n, length]` uint8 as numbers modulo the prime, by Horner's rule four bytes at a time."""
    padded = np.zeros((len(ids), -(-ids.shape[1] // 4) * 4), dtype=np.uint8)
    padded[:, -ids.shape[1] :] = ids
    words = padded.view(">u4").astype(np.uint64)
    codes = words[:, 0] % np.uint64(PRIME)
    for column in range(1, words.shape[1]):
        codes = (codes << np.uint64(32) | words[:, column]) % np.uint64(PRIME)
    return codes


def _same_ids(left: IdIndex, left_places: np.ndarray, right: IdIndex, right_places: np.ndarray) -> np.ndarray:
    """`[n]` bool: whether ids at these places are equal, pair by pair."""
    characters = [np.frombuffer(index._text, dtype=np.uint8) for index in (left, right)]
    begins = [left._offsets[left_places], right._offsets[right_places]]
    lengths = [left._offsets[left_places + 1] - begins[0], right._offsets[right_places + 1] - begins[1]]
    same = np.zeros(len(left_places), dtype=bool)
    equal = np.flatnonzero(lengths[0] == lengths[1])
    for length in np.unique(lengths[0][equal]).tolist():
        rows = equal[lengths[0][equal] == length]
        ids = [_windows(text, length)[begin[rows]] for text, begin in zip(characters, begins, strict=True)]
        same[rows] = (ids[0] == ids[1]).all(axis=1)
    return same


def _windows(characters: np.ndarray, length: int) -> np.ndarray:
    """Every `length` characters that follow one another, `[*, length]`, without a copy."""
    return np.lib.stride_tricks.sliding_window_view(characters, length)
