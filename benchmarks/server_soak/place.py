"""The folder that a soak has on the disk, and what its clients know; `making` fills it. Loads no torch."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CUSTOMERS, VERSIONS, TEXTS = 24, 6, 48
NEVER = -1.0
"""In `Place.replaced_s`: the version has not been served yet. 0: it is served now."""


@dataclass(frozen=True)
class Place:
    """A folder with all of it.

    Attributes:
        folder: the place.
    """

    folder: Path

    @property
    def customers(self) -> Path:
        """The folder that servers follow."""
        return self.folder / "customers"

    @property
    def keys(self) -> Path:
        """The servers' file of keys."""
        return self.folder / "keys.json"

    @property
    def address(self) -> Path:
        """Ports of HTTP and gRPC, as a load balancer knows them."""
        return self.folder / "address.json"

    def version(self, customer: int, number: int) -> Path:
        """The file of a customer's version."""
        return self.folder / "versions" / f"{customer}-{number}.safetensors"

    def replaced_s(self) -> np.memmap:
        """When each version was replaced, fp64 `[customers, versions]` of `time.monotonic`, shared by all processes."""
        return np.memmap(self.folder / "replaced", np.float64, "r+", shape=(CUSTOMERS, VERSIONS))


def name_of(customer: int) -> str:
    """A customer's id."""
    return f"customer-{customer}"


@dataclass(frozen=True)
class Known:
    """What a client knows.

    Attributes:
        texts: that it may ask.
        logits: fp32 `[customers + 1, versions, texts, labels]`; the last customer is the base, all versions alike.
        scores: of the most likely label, fp32 `[customers + 1, versions, texts]`.
        versions: customer and version of each digest.
        labels: names of the columns.
        keys: of each customer, and last one that may ask for all.
    """

    texts: list[str]
    logits: np.ndarray
    scores: np.ndarray
    versions: dict[str, tuple[int, int]]
    labels: list[str]
    keys: list[str]

    @classmethod
    def of(cls, folder: Path) -> "Known":
        """What `make` has left."""
        record = json.loads((folder / "known.json").read_text())
        arrays = np.load(folder / "known.npz")
        versions = {digest: (owner, number) for digest, owner, number in record["versions"]}
        return cls(record["texts"], arrays["logits"], arrays["scores"], versions, record["labels"], record["keys"])
