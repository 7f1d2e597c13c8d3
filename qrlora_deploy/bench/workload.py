"""What a subject is given to answer: token ids of a fixed shape, or texts of the user's own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qrlora_deploy.bench.report_parts import shape_name
from qrlora_deploy.errors import InputError

TURNS = 64
"""Batches of texts that take turns; every subject gets the same one in the same round."""

LENGTHS = (16, 32, 64, 128, 256, 512)
"""Of the captured graphs for texts; what is longer runs without."""


@dataclass(frozen=True)
class Workload:
    """Batches of one shape.

    Attributes:
        batch: rows.
        length: tokens of a row; None where they are texts.
        texts: a batch per turn.
        pairs: the second texts of each, where the data has pairs.
        seed: of the token ids.
    """

    batch: int
    length: int | None
    texts: tuple[tuple[str, ...], ...] = ()
    pairs: tuple[tuple[str, ...], ...] = ()
    seed: int = 0

    @property
    def name(self) -> str:
        """As `shape_name`."""
        return shape_name(self.batch, self.length)


def shaped_workloads(batches: Sequence[int], lengths: Sequence[int], seed: int) -> list[Workload]:
    """Every batch size with every length."""
    return [Workload(batch, length, seed=seed) for length in lengths for batch in batches]


def text_workloads(
    batches: Sequence[int], texts: Sequence[str], pairs: Sequence[str] | None, seed: int
) -> list[Workload]:
    """Batches drawn from the user's texts, which keep their lengths: a batch is padded to its longest.

    Raises:
        InputError: there are no texts.
    """
    if not texts:
        raise InputError("there are no texts to measure with")
    random = np.random.default_rng(seed)
    made = []
    for batch in batches:
        rows = [random.choice(len(texts), batch, replace=batch > len(texts)) for _ in range(TURNS)]
        first = tuple(tuple(texts[row] for row in turn) for turn in rows)
        second = tuple(tuple(pairs[row] for row in turn) for turn in rows) if pairs is not None else ()
        made.append(Workload(batch, None, first, second, seed))
    return made


def token_inputs(workload: Workload, names: Sequence[str], vocabulary: int, pad: int) -> dict[str, np.ndarray]:
    """Inputs of a fixed shape, int64 `[batch, length]` each: random tokens, none of them padding.

    Raises:
        InputError: the workload has texts instead.
    """
    if workload.length is None:
        raise InputError("a workload of texts has no fixed shape")
    tokens = np.random.default_rng(workload.seed).integers(0, vocabulary, (workload.batch, workload.length))
    tokens[tokens == pad] = (pad + 1) % vocabulary
    made = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
    return {name: made[name] for name in names}
