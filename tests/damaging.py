"""Files damaged at random, by a number that brings the same damage again; every reader's test takes them from here."""

import copy
import json
import math
import random
import struct
from typing import Any

DEEP, DEEPER, LONG_NUMBER = "@deep", "@deeper", "@long"
"""Stand for what Python's own writer cannot write: nested lists, and a number of more digits than it reads."""

STANDING_FOR = {DEEP: "[" * 300 + "]" * 300, DEEPER: '{"a":' * 100_000 + "1" + "}" * 100_000, LONG_NUMBER: "9" * 5000}

ODD: tuple[Any, ...] = (
    *("", "x", "1", "true", "../x", "/etc/passwd", "a\nb", "\u2028", "\0", "\ud800", "y" * 5_000, "y" * 50_000),
    *(-1, 0, 1, 2, 3, 7, 1.0, 1.5, 2**31, 2**63, 10**30, 10**4200, float("nan"), float("inf"), -float("inf")),
    *(None, True, False, [], {}, [[]], ["a"], [1, None], {"a": 1}, {"": ""}, DEEP, DEEPER, LONG_NUMBER),
)
"""Values of every type, to be put where another one belongs."""


def damaged_bytes(whole: bytes, chance: random.Random) -> bytes:
    """`whole` with bits turned over, bytes cut out, put in, doubled or moved, or with another length of the header."""
    first, last = sorted(chance.randrange(len(whole) + 1) for _ in range(2))
    kind = chance.randrange(8)
    if kind == 0:
        return whole[:first] + whole[last:]
    if kind == 1:
        return whole[:first]
    if kind == 2:
        return whole[:first] + chance.randbytes(chance.randrange(1, 40)) + whole[first:]
    if kind == 3:
        return whole[:last] + whole[first:]
    if kind == 4:
        return whole[:first] + bytes(min(last - first, 64)) + whole[min(last, first + 64) :]
    if kind == 5 and len(whole) > 8:
        return struct.pack("<Q", chance.choice((0, 1, len(whole), 2**31, 2**62, chance.randrange(2**64)))) + whole[8:]
    changed = bytearray(whole)
    for _ in range(chance.randrange(1, 5)):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def damage_value(record: Any, chance: random.Random, plain: bool = False) -> None:
    """Change one thing in a JSON value, in place: another value or type, one too many, or one less.

    Args:
        record: an object or a list that is not empty.
        chance: where from.
        plain: put in only what Python's own writer can write.
    """
    ways = _places(record)[1:]
    *path, key = chance.choice(ways)
    parent = _at(record, path)
    odd = copy.deepcopy(chance.choice([value for value in ODD if not plain or value not in tuple(STANDING_FOR)]))
    kind = chance.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        parent[key] = copy.deepcopy(_at(record, chance.choice(ways)))
    elif kind == 2 and isinstance(parent, list):
        parent.insert(chance.randrange(len(parent) + 1), odd)
    elif kind == 2:
        parent[chance.choice(("more", "", "y" * 50_000, "a\nb", "\ud800"))] = odd
    elif kind == 3:
        for _ in range(chance.choice((1, 3, 70))):
            parent[key] = [parent[key]] if chance.random() < 0.5 else {"a": parent[key]}
    else:
        parent[key] = odd


def damaged_json(text: str, chance: random.Random) -> bytes:
    """JSON with a value of another type, or damaged as any other bytes are."""
    if chance.random() < 0.3:
        return damaged_bytes(text.encode(), chance)
    record = json.loads(text)
    for _ in range(chance.randrange(1, 3)):
        if record:
            damage_value(record, chance)
    return json_text(record).encode("utf-8", "surrogatepass")


def json_text(record: Any) -> str:
    """A JSON value as text, with what only stands for something replaced by it."""
    written = json.dumps(record)
    for name, text in STANDING_FOR.items():
        written = written.replace(json.dumps(name), text)
    return written


def damaged_header(whole: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header, or the JSON text in its metadata, has a value of another type."""
    end = 8 + int(struct.unpack("<Q", whole[:8])[0])
    header = json.loads(whole[8:end])
    metadata = header["__metadata__"]
    if chance.random() < 0.6:
        name = chance.choice(list(metadata))
        metadata[name] = damaged_json(metadata[name], chance).decode("utf-8", "replace")
    else:
        damage_value(header, chance)
    text = json_text(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + whole[end:]


def same(found: Any, written: Any) -> bool:
    """Whether what was read is what is written, type for type: a number may be an int or a float, nothing else."""
    if isinstance(written, bool) or written is None or isinstance(written, str):
        return type(found) is type(written) and bool(found == written)
    if isinstance(written, dict):
        return (
            isinstance(found, dict)
            and found.keys() == written.keys()
            and all(same(found[key], written[key]) for key in written)
        )
    if isinstance(written, list):
        return isinstance(found, list | tuple) and len(found) == len(written) and all(map(same, found, written))
    if isinstance(found, float):
        return found == float(written) or (math.isnan(found) and math.isnan(written))
    return type(found) is type(written) and bool(found == written)


def _places(record: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    return [path, *(place for key, value in items for place in _places(value, (*path, key)))]


def _at(record: Any, path: Any) -> Any:
    for key in path:
        record = record[key]
    return record
