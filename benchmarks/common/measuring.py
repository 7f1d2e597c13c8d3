"""What every benchmark's record holds: the machine, and samples summed up."""

import datetime
import os
import platform
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

PERCENTILES = (50, 90, 95, 99)


def summary(samples_s: list[float], unit: float = 1e3) -> dict[str, float]:
    """Percentiles of samples in seconds, in milliseconds by default, and how many there were."""
    found = {f"p{rank}": float(np.percentile(samples_s, rank)) * unit for rank in PERCENTILES}
    return found | {"samples": len(samples_s)}


def environment(provider: str) -> dict[str, Any]:
    """Machine, versions and date of a record."""
    names = ("torch", "transformers", "onnxruntime-gpu", "peft", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if provider == "cuda" else "cpu",
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "tf32": False,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:
        return "not installed as a distribution"
