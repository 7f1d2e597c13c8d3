"""Decoders above a frozen trunk: hidden states of the tokens of prompts and answers come from a cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from qrlora_deploy.training.answers import PLACES
from qrlora_deploy.training.loop import SmallTrainer
from qrlora_deploy.training.precision import mixed_precision
from qrlora_deploy.training.rows import Rows
from qrlora_deploy.training.trunk.cache import TrunkCache, fill_cache
from qrlora_deploy.training.trunk.memory import CacheWish, find_room
from qrlora_deploy.training.trunk.split import SplitModel, split_decoder


@dataclass(frozen=True)
class CachedDecoder:
    """A decoder above its trunk, and what the trunk answers.

    Attributes:
        split: the decoder.
        cache: hidden states of every row.
    """

    split: SplitModel
    cache: TrunkCache

    def placed(self, rows: Rows, start: int) -> Rows:
        """Rows that know where their tokens are in the cache, from its row `start` on."""
        ends = self.cache.offsets[start : start + len(rows) + 1].tolist()
        return [row | {PLACES: range(*where)} for row, where in zip(rows, pairwise(ends), strict=True)]


class CachedDecoderTrainer(SmallTrainer):
    """Trains what is above the trunk on batches of placed rows, packed or not. Without dropout.

    Args:
        cached: the Trainer's model.
    """

    def __init__(self, *args: Any, cached: CachedDecoder, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cached = cached

    def graded(self, model: Any, batch: dict[str, Any], targets: torch.Tensor) -> torch.Tensor:
        """As that of the whole model: its own forward makes masks and positions."""
        inputs = {name: tensor for name, tensor in batch.items() if name != PLACES}
        with self.cached.split.given(self.cached.cache.at(batch[PLACES])):
            return super().graded(model, inputs, targets)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted."""
        return 0


def cache_decoder(
    model: Any, targets: Sequence[str], rows: Rows, collate: Callable[[list[Any]], Any], wish: CacheWish
) -> CachedDecoder:
    """Split a decoder and run its trunk over all rows.

    Args:
        model: on its device, with its side branches.
        targets: module paths of the adapted layers.
        rows: every row.
        collate: pads rows on the right.
        wish: where the cache shall be.

    Raises:
        InputError: the model cannot be split, its first block is adapted, or the cache has no room.
        OSError: the disk is full.
    """
    split = split_decoder(model, targets)
    parameter = next(model.parameters())
    count = sum(len(row["input_ids"]) for row in rows)
    size_bytes = count * model.config.get_text_config().hidden_size * parameter.element_size()
    room = find_room(wish.wanted, size_bytes, parameter.device, wish.folder)
    with mixed_precision(parameter.device):
        cache = fill_cache(split, rows, collate, room, report=wish.report(len(rows)))
    return CachedDecoder(split, cache)
