"""What a choice of directions saw of data, as a basis keeps it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


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

    files: Sequence[SeenFile]
    batches: int
    batch_size: int
    max_length: int
    seed: int

    def __post_init__(self) -> None:
        # A file gives a list; as a tuple it equals what was written.
        object.__setattr__(self, "files", tuple(self.files))

    def __str__(self) -> str:
        names = ", ".join(file.name for file in self.files)
        return f"{self.batches} batches of {names}"

    @property
    def record(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"files": [asdict(file) for file in self.files]}
