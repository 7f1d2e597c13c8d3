"""Rows of tokens: whether a model can take one, and many of them as one padded batch."""

from collections.abc import Sequence

import numpy as np

from qrlora_deploy.errors import MalformedInputError
from qrlora_deploy.runtime.bundle.bundle import Bundle
from qrlora_deploy.runtime.bundle.sealed_facts import CONFIG_FILE, read_config_facts
from qrlora_deploy.runtime.sessions.buckets import filling
from qrlora_deploy.runtime.sessions.running import text_inputs
from qrlora_deploy.serving.engine.rows import Row

INT64, UINT64 = np.dtype(np.int64), np.dtype(np.uint64)
"""Made once: numpy takes a microsecond to make one of a type."""


class Collator:
    """Makes batches of rows, and refuses rows that would fail the batch that they are in.

    Args:
        bundle: whose graph runs them.
    """

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self.names = text_inputs(manifest)
        self.max_length = manifest.max_length
        self._fill = filling(manifest)
        self._from_left = manifest.padding_side == "left"
        facts = read_config_facts(bundle.folder / CONFIG_FILE)
        self._stop = {"input_ids": facts.token_rows, "token_type_ids": facts.segment_rows, "attention_mask": 2}

    def check(self, rows: Sequence[Row]) -> None:
        """Make sure that rows can run.

        Raises:
            MalformedInputError: an input is missing or is no int64 array `[length]`, lengths differ, a row is empty
                or too long, or holds an id that the model has no row for; the row is named by its number.
        """
        for number, row in enumerate(rows):
            self._check_shape(row, number)
        for name in self.names:
            # All rows at once: numpy takes microseconds to begin.
            values = np.concatenate([row.inputs[name] for row in rows]) if len(rows) > 1 else rows[0].inputs[name]
            if not self._in_range(name, values):
                number = next(number for number, row in enumerate(rows) if not self._in_range(name, row.inputs[name]))
                self._refuse_range(name, number, rows[number].inputs[name])

    def _check_shape(self, row: Row, number: int) -> None:
        length = None
        for name in self.names:
            values = row.inputs.get(name)
            if not isinstance(values, np.ndarray) or values.dtype != INT64 or values.ndim != 1:
                raise MalformedInputError(f"the input {name} of row {number} must be an int64 array [length]")
            length = len(values) if length is None else length
            if not len(values) == length == row.length:
                raise MalformedInputError(
                    f"the inputs of row {number} must have one length, not {length} and {len(values)}"
                )
        if not 0 < row.length <= self.max_length:
            raise MalformedInputError(f"row {number} has {row.length} tokens; the model takes 1 to {self.max_length}")

    def _in_range(self, name: str, values: np.ndarray) -> bool:
        # As unsigned numbers negative ones are the greatest: one look instead of two.
        return int(np.maximum.reduce(values.view(UINT64))) < (self._stop.get(name) or 2**63)

    def _refuse_range(self, name: str, number: int, values: np.ndarray) -> None:
        stop = self._stop.get(name)
        bound = "0 or more" if stop is None else f"0 to {stop - 1}"
        raise MalformedInputError(
            f"the input {name} of row {number} must hold numbers of {bound}, not {values.min()} to {values.max()}"
        )

    def batch(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """The text inputs, int64 `[rows, longest row]` each, padded on the side that the tokenizer pads."""
        length = max(row.length for row in rows)
        return {name: self._padded([row.inputs[name] for row in rows], length, name) for name in self.names}

    def unpadded(self, logits: np.ndarray, length: int) -> np.ndarray:
        """Of a row's logits `[outputs]` all; of `[tokens, outputs]` those of its own tokens."""
        if logits.ndim == 1:
            return logits
        return logits[-length:] if self._from_left else logits[:length]

    def _padded(self, values: Sequence[np.ndarray], length: int, name: str) -> np.ndarray:
        batch = np.full((len(values), length), self._fill.get(name, 0), dtype=np.int64)
        for target, value in zip(batch, values, strict=True):
            if self._from_left:
                target[length - len(value) :] = value
            else:
                target[: len(value)] = value
        return batch
