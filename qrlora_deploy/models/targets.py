"""Choosing the layers to adapt."""

import re
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from qrlora_deploy.errors import InputError, argument, library_errors
from qrlora_deploy.models.families import BLOCK, FAMILIES
from qrlora_deploy.models.support import LeftOut, shared_layers

PROJECTIONS = {"query": "query", "key": "key", "value": "value", "q": "query", "k": "key", "v": "value"}
"""What `Attention` of every family names, also by its first letter."""


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's layer, which stores its weight as `[in, out]`."""
    return isinstance(module, Conv1D)


def is_adaptable(module: nn.Module) -> bool:
    """Whether a layer has a plain weight matrix that can be factorized."""
    return type(module) is nn.Linear or is_conv1d(module)


def choose_targets(model: nn.Module, patterns: Sequence[str] = (), last_layers: int | None = None) -> list[str]:
    """Module paths of the layers to adapt, in the model's order.

    Args:
        model: a model, which may live on the meta device.
        patterns: names of layers (`query`, `attention.output.dense`) or regular expressions over
            the whole module path; `query`, `key` and `value`, or `q`, `k` and `v`, mean those of families that call
            them otherwise, too; none means every linear layer of every numbered block, but for those
            that a switchable graph cannot take; `left_out` names them.
        last_layers: keep only the last N numbered blocks.

    Raises:
        InputError: a pattern fits no layer or is not a regular expression, N is out of range, or
            the model has no such layers; the message lists what there is.
    """
    adaptable = [name for name, module in model.named_modules() if is_adaptable(module)]
    in_blocks = [name for name in adaptable if BLOCK.search(f".{name}")]
    if not in_blocks:
        raise InputError(_why_nothing(model))
    shared = shared_layers(model, in_blocks)
    chosen = in_blocks if shared is None else [name for name in in_blocks if name not in shared.names]
    if patterns:
        patterns = [_own_name(pattern, adaptable) for pattern in patterns]
        unknown = [pattern for pattern in patterns if not any(_fits(pattern, name) for name in adaptable)]
        if unknown:
            known = sorted({BLOCK.split(f".{name}")[-1] for name in in_blocks})
            raise InputError(f"no layer is called {', '.join(unknown)}; there are {', '.join(known)}")
        chosen = [name for name in adaptable if any(_fits(pattern, name) for pattern in patterns)]
    return _keep_last(chosen, in_blocks, last_layers) if last_layers is not None else chosen


def left_out(model: nn.Module) -> list[LeftOut]:
    """What `choose_targets` leaves out of the numbered blocks where it has no patterns: nothing goes without a word."""
    adaptable = [name for name, module in model.named_modules() if is_adaptable(module)]
    shared = shared_layers(model, [name for name in adaptable if BLOCK.search(f".{name}")])
    weights = {f"{name}.weight" for name in adaptable}
    other = tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name not in weights and BLOCK.search(f".{name}")
    )
    found = LeftOut(other, "they are no matrices of linear layers, so they cannot be adapted")
    return ([shared] if shared else []) + ([found] if other else [])


def _why_nothing(model: nn.Module) -> str:
    own = {type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    others = sorted(own - {"Linear"})
    reason = f"; its layers are {', '.join(others)}, which compute in their own way" if others else ""
    return f"the model has no plain linear layers in numbered blocks{reason}; nothing to adapt"


def _own_name(pattern: str, adaptable: Sequence[str]) -> str:
    """What a model's family calls the projection `pattern`; other patterns, and names that the model has, stay."""
    if pattern not in PROJECTIONS or any(_fits(pattern, name) for name in adaptable):
        return pattern
    known = [getattr(family.attention, PROJECTIONS[pattern]) for family in FAMILIES if family.attention is not None]
    return next((own for own in known if any(_fits(own, name) for name in adaptable)), pattern)


def _fits(pattern: str, name: str) -> bool:
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    # Not re.error alone: deep nesting and large counts end in others.
    with library_errors(f"{argument('targets')} {pattern!r} is not a regular expression", InputError):
        return re.fullmatch(pattern, name) is not None


def _keep_last(chosen: list[str], in_blocks: list[str], count: int) -> list[str]:
    blocks = sorted({_block(name) for name in in_blocks})
    if not 1 <= count <= len(blocks):
        raise InputError(f"{argument('last_layers')} must be between 1 and {len(blocks)}, not {count}")
    kept = [name for name in chosen if BLOCK.search(f".{name}") and _block(name) in blocks[-count:]]
    if not kept:
        raise InputError(f"none of the chosen layers is in the last {count} blocks")
    return kept


def _block(name: str) -> int:
    found = BLOCK.search(f".{name}")
    return int(found.group(1)) if found else -1
