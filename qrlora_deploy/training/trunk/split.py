"""The frozen lower part of a model: below the first adapted block nothing depends on the coefficients.

Without dropout the hidden states there are the same in every step, epoch and run over the same
texts; `trunk_cache` keeps them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qrlora_deploy.errors import InputError, first_line
from qrlora_deploy.models.targets import BLOCK

Batch = Mapping[str, torch.Tensor]

Forward = Callable[[Any, Batch], torch.Tensor]
"""From a model and its inputs to answers, as `Task.forward`."""


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    """Logits `[rows, labels]`."""
    logits: torch.Tensor = model(**batch).logits
    return logits


def written_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits `[rows, length, vocabulary]` of a decoder, which keeps no keys and values for what would follow."""
    logits: torch.Tensor = model(**batch, use_cache=False).logits
    return logits


PROBE_LENGTH = 8


class _Reached(Exception):
    """The trunk has done its part; ends a forward pass early."""


@dataclass(frozen=True)
class SplitModel:
    """A model in two parts that share its modules: blocks below `first`, and the rest.

    Both parts run the model's own forward, so masks, relative or rotary positions and the head
    are the model's. Not for several threads at once: `upper` takes the trunk's blocks out of the
    model while it runs.

    Attributes:
        model: the whole model, which stays usable.
        owner: the module that holds the list of blocks.
        list_name: name of the list in `owner`.
        blocks: all blocks.
        first: index of the first adapted block; 0 leaves only the embeddings to the trunk.
        forward: gives the answers of the model to a batch.
    """

    model: Any
    owner: nn.Module
    list_name: str
    blocks: nn.ModuleList
    first: int
    forward: Forward

    def trunk(self, batch: Batch) -> torch.Tensor:
        """The input of the first adapted block, without dropout and without a gradient.

        Args:
            batch: what the model takes (`input_ids [rows, length]`, `attention_mask`, ...); labels
                are ignored.

        Returns:
            `[rows, length, width]`. Where the mask is 0 the values mean nothing.
        """
        found: list[torch.Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.blocks[self.first].register_forward_pre_hook(stop, with_kwargs=True):
                self.model(**_inputs(batch))
        except _Reached:
            pass  # the way a trunk ends
        finally:
            self.model.train(training)
        return found[0]

    def upper(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The rest of the model on what `trunk` gave; dropout as the model's mode has it.

        Args:
            hidden: `[rows, length, width]`.
            batch: as for `trunk`; masks and positions are made from it.

        Returns:
            The answers, such as logits `[rows, labels]` or `[rows, length, labels]`, with a gradient for what requires
            one.
        """
        with self.given(hidden):
            return self.forward(self.model, _inputs(batch))

    @contextmanager
    def given(self, hidden: torch.Tensor) -> Iterator[None]:
        """Within, the model's own forward begins above the trunk, with `hidden [rows, length, width]`."""

        def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        with self._without_trunk(), self.blocks[self.first].register_forward_pre_hook(give, with_kwargs=True):
            # The embeddings are computed for nothing: the model makes masks and positions from their shape.
            yield

    @contextmanager
    def _without_trunk(self) -> Iterator[None]:
        modules: dict[str, Any] = self.owner._modules
        modules[self.list_name] = nn.ModuleList(list(self.blocks)[self.first :])
        try:
            yield
        finally:
            modules[self.list_name] = self.blocks


def _inputs(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def split_model(
    model: Any, target_paths: Sequence[str], padding_side: str = "right", forward: Forward = logits_of
) -> SplitModel:
    """Split a model below the first of its adapted blocks.

    Side branches may be attached before or after, except to targets outside the blocks: those
    before. The split is tried on two short rows and held against the whole model.

    Args:
        model: a transformers model, such as BERT, RoBERTa, MPNet, DistilBERT, or a
            decoder with one plain list of blocks.
        target_paths: module paths of the adapted layers.
        padding_side: "right" or "left", of the batches to come.
        forward: gives the model's answers.

    Raises:
        InputError: the adapted layers are not in one numbered list, one of them comes before it,
            the blocks differ in kind, the parts do not answer as the whole does, or an answer
            depends on the padding (BERT padded on the left). The whole model must be trained then.
    """
    name = type(model).__name__
    places = [(match, path) for path in target_paths if (match := BLOCK.search(f".{path}."))]
    lists = {f".{path}."[1 : match.start()] for match, path in places}
    if len(lists) != 1:
        raise InputError(f"{name} cannot be split: its adapted layers are in {len(lists)} lists of blocks, not in one")
    owner_path, _, list_name = next(iter(lists)).rpartition(".")
    owner = model.get_submodule(owner_path)
    blocks = getattr(owner, list_name)
    kinds = set(getattr(model.config, "layer_types", None) or ["full"])
    if not isinstance(blocks, nn.ModuleList) or len(kinds) > 1:
        # With several kinds of attention the model counts its blocks to know which mask is whose.
        raise InputError(f"{name} cannot be split: its blocks are no plain list of one kind")
    split = SplitModel(model, owner, list_name, blocks, min(int(match.group(1)) for match, _ in places), forward)
    training = model.training
    model.eval()
    try:
        problem = _problem(split, target_paths, padding_side)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        raise InputError(f"{name} cannot be split: {first_line(error)}") from error
    finally:
        model.train(training)
    if problem:
        raise InputError(f"{name} cannot be split: {problem}")
    return split


def split_decoder(model: Any, target_paths: Sequence[str]) -> SplitModel:
    """The same of a decoder that writes text, whose rows are padded on the right.

    Raises:
        InputError: as of `split_model`; or the first block is adapted, and so there is no trunk.
    """
    split = split_model(model, target_paths, forward=written_logits)
    if split.first == 0:
        raise InputError(f"the first block of {type(model).__name__} is adapted, and below it nothing is computed")
    return split


def _problem(split: SplitModel, target_paths: Sequence[str], padding_side: str) -> str | None:
    """What is wrong with a split, seen on a row alone and beside a longer one."""
    batch, row = probe(split.model, padding_side)
    early: list[str] = []
    layers = {path: split.model.get_submodule(path) for path in target_paths}
    hooks = [
        layer.register_forward_pre_hook(lambda *_, path=path: early.append(path)) for path, layer in layers.items()
    ]
    try:
        hidden, alone = split.trunk(batch), split.trunk(row)
    finally:
        for hook in hooks:
            hook.remove()
    if early:
        return f"{early[0]} comes before the blocks"
    mask = batch["attention_mask"].bool()
    if hidden.shape[:2] != mask.shape or not agree(hidden[1, mask[1]], alone[0]):
        return f"what its trunk answers depends on padding on the {padding_side}"
    hidden[~mask] = 1.0  # as good as any other value
    with torch.no_grad():
        whole, parts = split.forward(split.model, batch), split.upper(hidden, batch)
    if whole.dim() > 2:  # of every token, and padding has no answer
        whole, parts = whole[mask], parts[mask]
    return None if agree(parts, whole) else f"its parts do not answer as the whole does, padded on the {padding_side}"


def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two ways to compute the same differ by roundings only."""
    # A new head answers 0.1 to everything, so little is let through: 1e-6 is usual in fp32.
    bound = 3e-5 if expected.dtype == torch.float32 else 1e-1
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=bound, atol=bound)


def probe(model: Any, padding_side: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two rows, the second half as long; and the second one alone."""
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    pad, short = config.pad_token_id or 0, PROBE_LENGTH // 2
    ids = (torch.arange(2 * PROBE_LENGTH).reshape(2, -1) * 7 + pad + 1) % config.vocab_size
    mask = torch.ones_like(ids)
    part, padding = slice(0, short), slice(short, None)
    if padding_side == "left":
        part, padding = padding, part
    mask[1, padding], ids[1, padding] = 0, pad
    ids, mask = ids.to(device), mask.to(device)
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch, {name: tensor[1:, part] for name, tensor in batch.items()}
