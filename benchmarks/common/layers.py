"""Which layers a benchmark adapts, whatever a family of models calls them."""

from collections.abc import Sequence

from torch import nn

from qrlora_deploy.models.families import FAMILIES
from qrlora_deploy.models.targets import choose_targets

NAMES = {
    projection: tuple(
        getattr(family.attention, projection).rpartition(".")[2] for family in FAMILIES if family.attention is not None
    )
    for projection in ("query", "value")
}
"""What the families call each projection."""

LAST_LAYERS = 4
"""Blocks that the paper adapts in its smallest set-ups, the last ones."""

TAU = 0.5
"""The paper's share of energy."""


def targets_of(model: nn.Module, projections: Sequence[str] = (), last_layers: int | None = None) -> list[str]:
    """Module paths of the layers to adapt, in the model's order.

    Args:
        model: which may live on the meta device.
        projections: keys of `NAMES`; none means every linear layer of every block.
        last_layers: keep only the last N blocks.

    Raises:
        InputError: the model has no such projection, or fewer blocks.
    """
    there = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    patterns = [next((name for name in NAMES[each] if name in there), each) for each in projections]
    return choose_targets(model, patterns, last_layers)
