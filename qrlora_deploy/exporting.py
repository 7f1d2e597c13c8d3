"""Exporters are found by name in an entry-point group, so that another package can add one."""

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from qrlora_deploy.errors import InputError

GROUP = "qrlora_deploy.exporters"

BUILT_IN = EntryPoint("onnx", "exporters.onnx:export_merged", GROUP)
"""Also registered by pyproject.toml; named here so that a checkout works without being installed."""


def find_exporter(name: str) -> Callable[..., Any]:
    """The exporter registered under `name`, which is called like `exporters.onnx.export_merged`.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    found = {point.name: point for point in (BUILT_IN, *entry_points(group=GROUP))}
    if name not in found:
        raise InputError(f"--format {name}: no such exporter; there are {', '.join(sorted(found))}")
    exporter: Callable[..., Any] = found[name].load()
    return exporter
