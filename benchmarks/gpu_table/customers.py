"""Millions of customers, made by arithmetic: who is where and what each one's numbers are."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.common.serving import LAST_LAYERS, save_base
from exporters.onnx import export_switchable
from exporters.onnx.options import OnnxOptions
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.sample import sample_texts
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.runtime import Bundle, Manifest, open_bundle
from qrlora_deploy.runtime.customers.packed_writer import write_packed_blocks

DIGITS = 8
BLOCK = 2**14
POOL = 2**14
"""Vectors that take turns, each with its customer's number in front: making ten million is not what is measured."""

STEP = 7919
"""A prime, so that neighbours have vectors that are far apart in the pool."""

BASE = 1024
"""The number is written in digits of this base, which fp16 holds exactly after division by it."""

PREFIX = np.frombuffer(b"customer-", dtype=np.uint8)


class Crowd:
    """Customers `0 .. count - 1` of a bundle.

    Args:
        manifest: of the bundle.
        count: how many.
    """

    def __init__(self, manifest: Manifest, count: int) -> None:
        self.manifest, self.count = manifest, count
        random = np.random.default_rng(0)
        self._pool = random.normal(size=(POOL, manifest.total_rank)).astype(np.float16)

    def names(self, numbers: np.ndarray) -> np.ndarray:
        """Ids `[n]` as bytes."""
        characters = np.empty((len(numbers), len(PREFIX) + DIGITS), dtype=np.uint8)
        characters[:, : len(PREFIX)] = PREFIX
        for place in range(DIGITS):
            characters[:, len(PREFIX) + place] = numbers // 10 ** (DIGITS - 1 - place) % 10 + ord("0")
        return characters.view(f"S{characters.shape[1]}").reshape(-1)

    def texts(self, numbers: np.ndarray) -> list[str]:
        """Ids as text."""
        return [name.decode() for name in self.names(numbers)]

    def values(self, numbers: np.ndarray) -> np.ndarray:
        """Coefficients `[n, total_rank]`, numbers that fp16 holds exactly; no two customers have the same."""
        values = self._pool[numbers * STEP % POOL]
        for place in range(min(3, values.shape[1])):
            values[:, place] = (numbers // BASE**place % BASE + 1) / BASE
        return values

    def customer(self, number: int, factor: float = 1.0) -> Coefficients:
        """One of them, its numbers times `factor`."""
        manifest = self.manifest
        return Coefficients(
            values=self.values(np.array([number]))[0].astype(np.float32) * np.float32(factor),
            basis_digest=manifest.basis_digest,
            base_name=manifest.base_name,
            base_digest=manifest.base_digest,
            task=manifest.task,
            labels=manifest.labels,
        )

    def write(self, path: Path) -> None:
        """All of them as a packed file in the dtype of the bundle's table."""
        write_packed_blocks(self._blocks(), path, self.manifest)

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, self.count, BLOCK):
            numbers = np.arange(first, min(first + BLOCK, self.count))
            yield self.names(numbers), self.values(numbers)


def make_bundle(folder: Path, model: str, rank: int, provider: str, precision: str) -> Bundle:
    """Export a switchable bundle with an fp16 table: query projections of the last layers, random weights."""
    checkpoint = open_checkpoint(str(save_base(folder / "base", model)))
    targets = choose_targets(checkpoint.skeleton(), ["query"], LAST_LAYERS)
    basis = factorize(checkpoint, targets, FixedRank(rank))
    texts = Examples(sample_texts()[:8], None, ["0"] * 8, "samples")
    options = OnnxOptions(data=texts, provider=provider, precision=precision, table_dtype="fp16")
    export_switchable(ExportJob(checkpoint, basis, folder / "bundle"), options)
    return open_bundle(folder / "bundle")


def place_for(size_bytes: int) -> Path:
    """Where a file of that size is written fastest: the system's memory if it has room, or else the disk."""
    import shutil

    shared = Path("/dev/shm")
    fits = shared.is_dir() and shutil.disk_usage(shared).free > 1.2 * size_bytes
    return shared if fits else Path(tempfile.gettempdir())
