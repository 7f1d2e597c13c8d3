"""What a customer's file says of its training, alone or in a fleet."""

from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.training.settings import TrainSettings
from qrlora_deploy.training.tuning import Tuned
from qrlora_deploy.version import __version__


@dataclass(frozen=True)
class Ran:
    """What became of one customer's run.

    Attributes:
        steps: of the optimizer.
        epochs: that ran.
        metric: that chose the best epoch.
        metrics: of that epoch, on the held-out rows.
        baseline: before training.
        loss: mean of the last epoch.
        device: "cpu" or "cuda".
        trunk_cache: where the trunk's answers were kept; None in a fleet, which keeps them on its device.
        remark: of `Outputs`.
        tuned: the customer's thresholds, and the metrics with them.
    """

    steps: int
    epochs: float
    metric: str
    metrics: dict[str, float]
    baseline: dict[str, float]
    loss: float
    device: str
    trunk_cache: str | None = None
    remark: str = ""
    tuned: Tuned = field(default_factory=Tuned)


def training_record(train: Examples, evaluation: Examples | None, settings: TrainSettings, ran: Ran) -> dict[str, Any]:
    """The training record of a coefficients file, of `settings` that are resolved."""
    return {
        "data_digest": train.digest,
        **({"evaluation_digest": evaluation.digest} if evaluation else {}),
        "rows": len(train),
        "evaluation_rows": len(evaluation) if evaluation else 0,
        "seed": settings.seed,
        "steps": ran.steps,
        "epochs": ran.epochs,
        "batch_size": settings.batch_size,
        "learning_rate": settings.rate,
        "max_length": settings.max_length,
        "head": settings.head,
        **({"remark": ran.remark} if ran.remark else {}),
        "dropout": settings.dropout,
        **({"packing": True} if settings.packing else {}),
        **({"base_dtype": settings.base_dtype} if settings.base_dtype != "fp32" else {}),
        **({"trunk_cache": ran.trunk_cache} if ran.trunk_cache else {}),
        "metric": ran.metric,
        "metrics": ran.metrics,
        **({"tuned_metrics": ran.tuned.metrics} if ran.tuned.metrics else {}),
        "baseline": ran.baseline,
        "loss": ran.loss,
        "device": ran.device,
        "versions": _versions(),
    }


@cache
def _versions() -> dict[str, str]:
    return {"qrlora-deploy": __version__, "torch": torch.__version__, "transformers": version("transformers")}
