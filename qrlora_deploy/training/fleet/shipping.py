"""From the host to the device without waiting: a record with all its tensors in one copy."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

ALIGNMENT = 16
"""Bytes; where a tensor begins in the copy, as kernels that read several values at once want it."""

Record = TypeVar("Record")


def ship(record: Record, device: torch.device) -> Record:
    """A record whose tensors are on the device; nothing is waited for.

    Args:
        record: a tensor on the CPU, or a tuple or data class of such things; what else is in it stays.
        device: where to. On the CPU the record itself is returned.
    """
    if device.type != "cuda":
        return record
    # Pinned: a copy from other memory is waited for, and the device would run dry in every step.
    return in_one_copy(record, lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True), device)


def in_one_copy(record: Record, allocate: Callable[[int], torch.Tensor], device: torch.device) -> Record:
    """The same by way of bytes `allocate(size)` on the host."""
    tensors = list(_tensors(record))
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    starts = np.cumsum([0, *sizes]).tolist()
    buffer = allocate(starts[-1])
    flat = buffer.numpy()
    for tensor, start in zip(tensors, starts[:-1], strict=True):
        flat[start : start + tensor.nbytes] = tensor.numpy().reshape(-1).view(np.uint8)
    there = buffer.to(device, non_blocking=True)
    views = (
        there[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(tensors, starts[:-1], strict=True)
    )
    moved: Record = _replaced(record, views)
    return moved


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    for part in _parts(value):
        yield from _tensors(part)


def _replaced(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The same record with other tensors, in the order of `_tensors`."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    parts = [_replaced(part, tensors) for part in _parts(value)]
    if isinstance(value, tuple):
        return tuple(parts)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(value, **{item.name: part for item, part in zip(fields(value), parts, strict=True)})


def _parts(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return list(value)
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, item.name) for item in fields(value)]
    return []
