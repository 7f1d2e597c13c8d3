"""What a choice of directions saw of data, as a basis keeps it."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from qrlora_deploy.io.strict import from_json


@dataclass(frozen=True)
class SeenFile:
    """One file of text.

    Attributes:
        name: as it was given.
        digest: SHA-256 over its texts and labels.
        rows: how many it has.
    """

    name: str
    digest: str
    rows: int


@dataclass(frozen=True)
class Seen:
    """The batches that a base was run on.

    Attributes:
        files: of one customer each; batches come from them in turn.
        batches: how many.
        batch_size: rows of each.
        max_length: tokens of a row that were read.
        seed: of the rows that were drawn.
    """

    files: tuple[SeenFile, ...]
    batches: int
    batch_size: int
    max_length: int
    seed: int

    def __str__(self) -> str:
        names = ", ".join(file.name for file in self.files)
        return f"{self.batches} batches of {names}"

    @property
    def record(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"files": [asdict(file) for file in self.files]}


def read_seen(record: dict[str, Any]) -> Seen:
    """What `Seen.record` made.

    Raises:
        FileFormatError: it is something else.
    """
    return from_json(Seen, json.dumps(record), "what the basis saw")
