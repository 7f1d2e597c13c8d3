"""How a batch lies in the inputs of a graph of fixed shapes: padded, with the tokens that count, or tokens alone."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from qrlora_deploy.runtime.bundle.bundle import Manifest
from qrlora_deploy.runtime.sessions.buckets import filling, pad_into
from qrlora_deploy.runtime.sessions.packed_tokens import (
    is_packed,
    packed_names,
    packed_shapes,
    packed_size,
    write_packed,
)
from qrlora_deploy.runtime.sessions.running import Inputs, is_padding_free, text_inputs
from qrlora_deploy.runtime.sessions.token_index import TOKEN_INDEX, kept_tokens, padded_tokens, write_tokens


class Layout(Protocol):
    """How a batch is written into a bucket `(rows, length)`."""

    def tokens(self, bucket: tuple[int, int], inputs: Inputs) -> int:
        """The size beside rows and length that a graph for this batch has; 0 where it has none."""

    def shapes(self, bucket: tuple[int, int], tokens: int) -> dict[str, tuple[int, ...]]:
        """Of the inputs, by name."""

    def write(self, targets: Mapping[str, np.ndarray], inputs: Inputs) -> None:
        """Write a batch into arrays of these shapes."""


class PaddedLayout:
    """Rows and tokens are filled up.

    Args:
        manifest: of the bundle.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.names, self._fill = text_inputs(manifest), filling(manifest)

    def tokens(self, bucket: tuple[int, int], inputs: Inputs) -> int:
        """None."""
        return 0

    def shapes(self, bucket: tuple[int, int], tokens: int) -> dict[str, tuple[int, ...]]:
        """As `Layout.shapes`."""
        return dict.fromkeys(self.names, bucket)

    def write(self, targets: Mapping[str, np.ndarray], inputs: Inputs) -> None:
        """As `Layout.write`."""
        for name in self.names:
            pad_into(targets[name], inputs[name], self._fill.get(name, 0), int(name == "attention_mask"))


class PaddingFreeLayout(PaddedLayout):
    """The same, and the positions of the tokens that take part; a row beyond the batch has one."""

    def tokens(self, bucket: tuple[int, int], inputs: Inputs) -> int:
        """As `Layout.tokens`."""
        mask = inputs["attention_mask"]
        further = bucket[0] - len(mask)
        return padded_tokens(int((mask != 0).sum() + (mask[:, 0] == 0).sum()) + further, *bucket)

    def shapes(self, bucket: tuple[int, int], tokens: int) -> dict[str, tuple[int, ...]]:
        """As `Layout.shapes`."""
        return super().shapes(bucket, tokens) | {TOKEN_INDEX: (tokens,)}

    def write(self, targets: Mapping[str, np.ndarray], inputs: Inputs) -> None:
        """As `Layout.write`."""
        super().write(targets, inputs)
        write_tokens(targets[TOKEN_INDEX], kept_tokens(targets["attention_mask"]))


class PackedLayout:
    """Tokens alone, one row behind the other; a row beyond the batch has none.

    Args:
        session: of the graph.
    """

    def __init__(self, session: Any) -> None:
        self._names = packed_names(session)

    def tokens(self, bucket: tuple[int, int], inputs: Inputs) -> int:
        """As `Layout.tokens`."""
        return packed_size(int((inputs["attention_mask"] != 0).sum()), *bucket)

    def shapes(self, bucket: tuple[int, int], tokens: int) -> dict[str, tuple[int, ...]]:
        """As `Layout.shapes`."""
        return packed_shapes(self._names, *bucket, tokens)

    def write(self, targets: Mapping[str, np.ndarray], inputs: Inputs) -> None:
        """As `Layout.write`."""
        write_packed({name: targets[name] for name in self._names}, inputs)


def layout_of(session: Any, manifest: Manifest) -> Layout:
    """How batches lie in the inputs of a session."""
    if is_packed(session):
        return PackedLayout(session)
    return PaddingFreeLayout(manifest) if is_padding_free(session) else PaddedLayout(manifest)
