"""The methods that are compared, and the bases that they share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.common.layers import LAST_LAYERS, TAU, targets_of
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.factorization.selection import keep_directions
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.adapter import attach, precondition
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.rank_rules.base import RankRule
from qrlora_deploy.rank_rules.budgets import largest
from qrlora_deploy.rank_rules.energy_budget import EnergyBudget
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.even_budget import EvenBudget
from qrlora_deploy.rank_rules.sensitivity_budget import SensitivityBudget
from qrlora_deploy.training.observing import Observation, second_moments, sensitivities
from qrlora_deploy.training.settings import default_rate

BUDGET = 640
"""Coefficients of a customer, as many as the paper's smallest set-up has on a base of this shape."""

LORA_RATE = 5e-4
"""The customary one."""

QUARTER = 0.25
"""Of the rate by count, for directions of all layers: found on GLUE's MRPC and CoLA, not on these customers."""

LOOK = Observation()


@dataclass(frozen=True)
class Method:
    """How a customer is trained.

    Attributes:
        name: key in the records.
        title: row of the table.
        basis: whose coefficients are trained, by its name; empty: none, it is LoRA.
        rate_factor: of the rate for this number of coefficients.
        bounded: whether the rate is the one that `train` takes, which layers and steps bound.
    """

    name: str
    title: str
    basis: str = ""
    rate_factor: float = 1.0
    bounded: bool = False

    def rate_of(self, basis: Basis, steps: int) -> float:
        """The peak learning rate of coefficients in a run of so many steps."""
        if self.bounded:
            return default_rate(basis.total_rank, 1.0, len(basis.targets), steps)
        return self.rate_factor * default_rate(basis.total_rank)


METHODS = {
    method.name: method
    for method in (
        Method("q4", "q of the last 4, τ = 0.5", "q4"),
        Method("even", f"even {BUDGET}", "even", QUARTER),
        Method("energy", f"energy {BUDGET}", "energy", QUARTER),
        Method("sensitivity", f"sensitivity {BUDGET}, shared", "sensitivity", QUARTER),
        Method("own", f"sensitivity {BUDGET}, each customer's own", "own", QUARTER),
        Method("whiten", f"even {BUDGET}, whitened, shared", "whiten", QUARTER),
        Method("all", "all linear, τ = 0.5", "all"),
        Method("lora", "LoRA, r = 8, q and v (PEFT)"),
        Method("even-full", f"even {BUDGET}, rate by count", "even"),
        Method("energy-full", f"energy {BUDGET}, rate by count", "energy"),
        Method("sensitivity-full", f"sensitivity {BUDGET}, shared, rate by count", "sensitivity"),
        Method("own-full", f"sensitivity {BUDGET}, each customer's own, rate by count", "own"),
        Method("whiten-full", f"even {BUDGET}, whitened, shared, rate by count", "whiten"),
        Method("even-train", f"even {BUDGET}, rate of train", "even", bounded=True),
        Method("sensitivity-train", f"sensitivity {BUDGET}, shared, rate of train", "sensitivity", bounded=True),
        Method("whiten-train", f"even {BUDGET}, whitened, shared, rate of train", "whiten", bounded=True),
        Method("all-half", "all linear, τ = 0.5, half the rate by count", "all", 0.5),
    )
}

OF_THE_BASE = ("full", "q4", "even", "energy", "all")
"""Bases that need no data; "full" has every direction."""

OF_THE_POOL = ("sensitivity", "whiten")
"""Bases that are chosen on the pool."""

OWN = "own"


def base_basis(name: str, base: Checkpoint, device: str) -> Basis:
    """A basis of the encoder that needs no data, by its name."""
    rules: dict[str, RankRule] = {
        "full": EnergyShare(1.0),
        "q4": EnergyShare(TAU),
        "all": EnergyShare(TAU),
        "even": EvenBudget(BUDGET),
        "energy": EnergyBudget(BUDGET),
    }
    names = targets_of(base.skeleton(), *((("query",), LAST_LAYERS) if name == "q4" else ()))
    return factorize(base, names, rules[name], device)


def sensitive_basis(start: Checkpoint, full: Basis, data: list[Examples], device: str) -> Basis:
    """The most sensitive directions of `full` at a start whose head knows the labels of the data."""
    kept = largest(sensitivities(start, full, data, LOOK, device), BUDGET)
    return keep_directions(full, kept, SensitivityBudget(BUDGET, LOOK.seen(data)))


def whitened_basis(base: Checkpoint, data: list[Examples], device: str) -> Basis:
    """As many directions of each layer, its columns weighted by its inputs."""
    names = targets_of(base.skeleton())
    return factorize(base, names, EvenBudget(BUDGET), device, moments=second_moments(base, names, data, LOOK, device))


def kinds_of(basis: Basis) -> dict[str, int]:
    """How many directions each kind of layer has, by the last two parts of its name."""
    found: dict[str, int] = {}
    for name, rank in basis.ranks.items():
        kind = ".".join(name.split(".")[-2:])
        found[kind] = found.get(kind, 0) + rank
    return found


def prepare(
    method: Method, model: Any, basis: Basis | None, steps: int
) -> tuple[nn.Module, list[dict[str, Any]], float]:
    """The model that is trained, the groups of its optimiser, and the peak rate; the head is frozen."""
    if basis is None:
        names = targets_of(model, ("query", "value"))
        device = next(model.parameters()).device
        model.requires_grad_(False)
        wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names)).to(device)
        trained = [value for value in wrapped.parameters() if value.requires_grad]
        return wrapped.get_base_model(), [{"params": trained, "lr": LORA_RATE}], LORA_RATE
    adapters = attach(model, basis)
    precondition(adapters)
    rate = method.rate_of(basis, steps)
    return model, [{"params": [adapter.u for adapter in adapters.values()], "lr": rate}], rate


def basis_file(folder: Path, name: str) -> Path:
    """Where a basis is kept."""
    return folder / f"{name}.safetensors"
