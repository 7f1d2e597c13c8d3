"""Which layers a fleet and its peers adapt, by the name that each family of models gives them."""

from collections.abc import Callable, Sequence

from qrlora_deploy.checkpoint import Checkpoint
from qrlora_deploy.targets import choose_targets

LAST_LAYERS = 4
QUERIES = ("query", "q", "q_lin", "q_proj")
VALUES = ("value", "v", "v_lin", "v_proj")


def paper_targets(checkpoint: Checkpoint) -> list[str]:
    """The query projections of the last four blocks: the paper's smallest set-up."""
    return choose_targets(checkpoint.skeleton(), _present(checkpoint, QUERIES), LAST_LAYERS)


def linear_targets(checkpoint: Checkpoint) -> list[str]:
    """Every linear layer of every block."""
    return choose_targets(checkpoint.skeleton())


def customary_targets(checkpoint: Checkpoint) -> list[str]:
    """Query and value of every block: what LoRA customarily adapts."""
    return choose_targets(checkpoint.skeleton(), _present(checkpoint, QUERIES, VALUES))


def _present(checkpoint: Checkpoint, *spellings: Sequence[str]) -> list[str]:
    layers = {name.rsplit(".", 1)[-1] for name, _ in checkpoint.skeleton().named_modules()}
    return [next(name for name in names if name in layers) for names in spellings]


TARGETS: dict[str, Callable[[Checkpoint], list[str]]] = {"paper": paper_targets, "linear": linear_targets}
"""What a fleet adapts, by its name on the command line."""
