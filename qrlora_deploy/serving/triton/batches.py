"""Rows of many requests as batches of few lengths: Triton joins batches of one shape alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qrlora_deploy.runtime.bundle.bundle import Bundle
from qrlora_deploy.runtime.sessions.buckets import Buckets, filling, pad_into
from qrlora_deploy.serving.engine.collating import Collator
from qrlora_deploy.serving.engine.rows import Row


@dataclass(frozen=True)
class Batch:
    """What the graph's model is given at once.

    Attributes:
        inputs: of the graph, by name: text inputs int64 `[n, length]`, and the numbers of customers `[n, width]`.
        places: of each row: which request, and which of its rows.
        longest: tokens of the longest row; behind them all is padding.
    """

    inputs: dict[str, np.ndarray]
    places: list[tuple[int, int]]
    longest: int


class BatchMaker:
    """Makes batches for a bundle's graph.

    Args:
        bundle: says how rows are padded.
        buckets: the lengths that rows are padded to, and how many rows a batch has at most.
    """

    def __init__(self, bundle: Bundle, buckets: Buckets) -> None:
        self._collator = Collator(bundle)
        self._fill = filling(bundle.manifest)
        self._lengths, self._most = buckets.lengths, buckets.batches[-1]

    def make(self, asked: Sequence[tuple[Sequence[Row], Mapping[str, np.ndarray]]]) -> Iterator[Batch]:
        """Batches of all rows, rows of similar length together.

        Args:
            asked: of each request the rows, and the numbers of their customers by the graph's input.
        """
        places: dict[int, list[tuple[int, int]]] = {}
        for one, (rows, _) in enumerate(asked):
            for number, row in enumerate(rows):
                places.setdefault(self._length(row.length), []).append((one, number))
        for length, members in sorted(places.items()):
            for start in range(0, len(members), self._most):
                yield self._batch(length, members[start : start + self._most], asked)

    def own_tokens(self, logits: np.ndarray, batch: Batch, length: int) -> np.ndarray:
        """Of a row's logits `[outputs]` all; of `[tokens, outputs]` those of its own tokens."""
        return self._collator.unpadded(logits if logits.ndim == 1 else logits[: batch.longest], length)

    def _length(self, tokens: int) -> int:
        """The length that a row is padded to; a row longer than all of them stays as it is."""
        return next((length for length in self._lengths if length >= tokens), tokens)

    def _batch(
        self,
        length: int,
        members: list[tuple[int, int]],
        asked: Sequence[tuple[Sequence[Row], Mapping[str, np.ndarray]]],
    ) -> Batch:
        rows = [asked[one][0][number] for one, number in members]
        inputs = {}
        for name, values in self._collator.batch(rows).items():
            inputs[name] = np.empty((len(rows), length), dtype=np.int64)
            pad_into(inputs[name], values, self._fill.get(name, 0), 0)
        names = asked[members[0][0]][1]
        numbers = {name: np.stack([asked[one][1][name][number] for one, number in members]) for name in names}
        return Batch(inputs | numbers, members, max(row.length for row in rows))
