"""The quick way to read a file of the project takes what safetensors takes, and reads the same in it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from qrlora_deploy.io.arrays import save_arrays
from qrlora_deploy.io.sealing import METADATA_KEY
from qrlora_deploy.io.tensor_content import HEADER, _as_allowed, _as_written

RECORD = json.dumps({"labels": ["é", 'a "b"', "\\", "\n"], "n": 1})
ARRAYS = {"coefficients": np.arange(6, dtype=np.float32), "head.w": np.ones((2, 3), np.float32)}


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    save_arrays(tmp_path / "file", ARRAYS, {METADATA_KEY: RECORD})
    return (tmp_path / "file").read_bytes()


def as_plain(found: tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...], object]]]) -> object:
    raw, parts = found
    return raw, {name: (dtype, shape, bytes(data)) for name, (dtype, shape, data) in parts.items()}  # type: ignore[call-overload]


def with_header(content: bytes, old: str, new: str) -> bytes:
    """Another header before the same data; it is filled up to a multiple of eight."""
    start = HEADER + int.from_bytes(content[:HEADER], "little")
    header = content[HEADER:start].decode().rstrip(" ")
    assert header.count(old) == 1
    changed = header.replace(old, new).encode()
    changed += b" " * (-len(changed) % 8)
    return len(changed).to_bytes(HEADER, "little") + changed + content[start:]


def test_both_ways_read_the_same(content: bytes) -> None:
    quick = _as_written(content)
    assert quick is not None and as_plain(quick) == as_plain(_as_allowed(content))
    assert quick[0] == {METADATA_KEY: RECORD}
    by_the_library = safetensors.numpy.save(ARRAYS, {METADATA_KEY: RECORD})
    quick = _as_written(by_the_library)
    assert quick is not None and as_plain(quick) == as_plain(_as_allowed(by_the_library))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"shape":[6]', '"shape":[7]'),
        ('"shape":[6]', '"shape":[06]'),
        ('"shape":[6]', '"shape":[-6]'),
        ('"shape":[6]', '"shape":[6.0]'),
        ('"shape":[6]', '"shape":[٦]'),
        ('"shape":[2,3]', '"shape":[3,3]'),
        ('"shape":[2,3]', '"shape":[2,3,]'),
        ('"data_offsets":[0,24]', '"data_offsets":[0,28]'),
        ('"data_offsets":[24,48]', '"data_offsets":[20,44]'),
        ('"data_offsets":[24,48]', '"data_offsets":[0,24]'),
        ('"data_offsets":[24,48]}', '"data_offsets":[24,48]},'),
        ('"head.w"', '"coefficients"'),
        ('"head.w"', '"__metadata__"'),
        ('"head.w"', '"a\tb"'),
        ('{"qrlora"', '{"other":"x","qrlora"'),
        ('{"qrlora"', '{"qrlora":"x","qrlora"'),
        ("\\n", "\n"),
        ("\\n", "\\ud800"),
    ],
)
def test_what_is_not_to_the_letter_as_written_is_left_to_safetensors(content: bytes, old: str, new: str) -> None:
    old = json.dumps(old)[1:-1] if old == "\\n" else old
    assert _as_written(with_header(content, old, new)) is None


@pytest.mark.parametrize("change", [lambda it: it[:-1], lambda it: it + b"\0", lambda it: it[:5], lambda it: b""])
def test_a_file_of_another_length_is_left_to_safetensors(content: bytes, change: object) -> None:
    assert _as_written(change(content)) is None  # type: ignore[operator]


def test_what_is_taken_quickly_safetensors_takes_too_and_reads_the_same(content: bytes) -> None:
    """Headers with a few letters changed, removed or put in."""
    dice, taken = random.Random(0), 0
    start = HEADER + int.from_bytes(content[:HEADER], "little")
    for _ in range(10_000):
        damaged = bytearray(content)
        for _ in range(dice.randint(1, 2)):
            place = dice.randrange(HEADER, start)
            letter = dice.choice(b'{}[]:,"\\ 01234589aeu')
            damaged[place : place + dice.choice((0, 1, 1))] = bytes([letter]) * dice.choice((0, 1, 1))
        damaged[:HEADER] = (start - HEADER + len(damaged) - len(content)).to_bytes(HEADER, "little")
        quick = _as_written(bytes(damaged))
        if quick is not None:
            taken += 1
            assert as_plain(quick) == as_plain(_as_allowed(bytes(damaged)))
    assert taken > 100
