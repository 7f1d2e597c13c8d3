"""A safetensors file that was read already, such as one that somebody sent: nothing of it is written or mapped."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from qrlora_deploy.errors import library_errors
from qrlora_deploy.io.reading import holds_surrogate
from qrlora_deploy.io.sealing import METADATA_KEY, Allows, check_parts, read_record, unsealed
from qrlora_deploy.io.versions import Versions

HEADER = 8
"""Bytes before the header of a safetensors file: its length."""

METADATA = "__metadata__"

RECORD = f'{{"{METADATA}":{{"{METADATA_KEY}":'
"""What the header of a file of this project begins with; the text of the record follows."""

NUMBER = "(?:0|[1-9][0-9]{0,14})"
TENSOR = re.compile(
    rf',"([^"\\\x00-\x1f]+)":{{"dtype":"F32","shape":\[({NUMBER}(?:,{NUMBER})*)\],"data_offsets":\[({NUMBER}),({NUMBER})\]}}'
)
"""What the header of such a file says of a tensor: its name, its shape, and where it begins and ends in the data."""

MAX_PLAIN_BYTES = 2**20
"""Longest header that is taken apart here."""

_decoder = json.JSONDecoder()

Parts = dict[str, tuple[str, tuple[int, ...], Any]]
"""dtype, shape and bytes of each tensor, by name, as they follow one another."""


def read_tensors_content(
    content: bytes, path: Path | str, kind: str, versions: Versions, allows: Allows
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """As `files.read_tensors`, from the content of a file; `path` is what messages call it."""
    with library_errors(f"{path} is not a complete safetensors file"):
        raw, found = _as_written(content) or _as_allowed(content)
    metadata = read_record(path, raw, kind, versions)
    check_parts(path, kind, metadata, {name: (dtype, shape) for name, (dtype, shape, _) in found.items()}, allows)
    tensors = {name: np.frombuffer(data, "<f4").reshape(shape).copy() for name, (_, shape, data) in found.items()}
    return tensors, unsealed(path, tensors, metadata, versions, raw[METADATA_KEY])


def _as_allowed(content: bytes) -> tuple[dict[str, str], Parts]:
    """Metadata and tensors of any file that safetensors takes."""
    found = dict(safetensors.deserialize(content))
    header = json.loads(content[HEADER : HEADER + int.from_bytes(content[:HEADER], "little")])
    parts = {name: (part["dtype"], tuple(part["shape"]), part["data"]) for name, part in found.items()}
    return header.get(METADATA) or {}, parts


def _as_written(content: bytes) -> tuple[dict[str, str], Parts] | None:
    """The same of a file whose header is to the letter as this project writes it, several times as fast.

    None: it is another one, or a damaged one; then safetensors is asked. It takes whatever is taken here.
    """
    start = HEADER + int.from_bytes(content[:HEADER], "little")
    if start > min(len(content), MAX_PLAIN_BYTES):
        return None
    try:
        header = content[HEADER:start].decode()
        if not header.startswith(f'{RECORD}"') or holds_surrogate(header):
            return None
        record, place = _decoder.raw_decode(header, len(RECORD))
    except ValueError:
        return None
    parts = _parts(header, place, memoryview(content)[start:])
    return None if parts is None else ({METADATA_KEY: record}, parts)


def _parts(header: str, place: int, data: memoryview) -> Parts | None:
    """The tensors that a header speaks of behind its record, one behind the other to the end of `data`; or None."""
    if not header.startswith("}", place):
        return None
    place, filled, parts = place + 1, 0, Parts()
    while found := TENSOR.match(header, place):
        name, sizes, first, last = found.groups()
        shape = tuple(map(int, sizes.split(",")))
        begin, filled = filled, filled + 4 * math.prod(shape)
        if name in parts or name == METADATA or (int(first), int(last)) != (begin, filled):
            return None
        parts[name] = ("F32", shape, data[begin:filled])
        place = found.end()
    whole = filled == len(data) and header[place:].rstrip(" ") == "}"
    return parts if parts and whole else None
