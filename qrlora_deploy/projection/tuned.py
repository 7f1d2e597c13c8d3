"""A checkpoint that was tuned as a whole, as changes of tensors."""

from collections.abc import Collection, Iterator

import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.models.checkpoint import Checkpoint


def changes(base: Checkpoint, tuned: Checkpoint, heads: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that `tuned` has otherwise than `base`, by name, and the difference in fp64; one at a time.

    Args:
        base: what was tuned.
        tuned: a checkpoint of the same model.
        heads: tensors that are no part of this; they may have other shapes.

    Raises:
        InputError: a tensor is missing or has another shape.
    """
    for name, stored in base.stored.items():
        if name in heads:
            continue
        other = tuned.stored.get(name)
        if other is None or tuple(other.shape) != tuple(stored.shape):
            found = "there is none" if other is None else f"shape {list(other.shape)} instead of {list(stored.shape)}"
            raise InputError(f"{tuned.name} was not tuned from {base.name}: {name}: {found}")
        if base.tensor_digest(name) != tuned.tensor_digest(name):
            before, after = base.read(name), tuned.read(name)
            yield name, (after.double() - before.double()).numpy()
