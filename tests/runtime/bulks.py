"""Customers of a table that come together, by names that are there."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qrlora_deploy.runtime.table.id_index import IdIndex, encode_ids
from qrlora_deploy.runtime.table.table import CoefficientTable


def index_of(names: Sequence[str] | np.ndarray) -> IdIndex:
    """The index of names, each once, as texts or as an array of bytes."""
    return IdIndex(*encode_ids(names))


def publish_many(
    table: CoefficientTable, names: Sequence[str], blocks: Iterable[dict[str, np.ndarray]], note: Any = None
) -> None:
    """`publish_bulk` of these customers."""
    table.publish_bulk(len(names), blocks, lambda: index_of(names), note)
