"""Exporters are found by name: those of this project, and those that other packages register as entry points."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from qrlora_deploy.errors import InputError, QrloraError, argument, first_line, library_errors
from qrlora_deploy.exporting.options import RESERVED

if TYPE_CHECKING:
    from qrlora_deploy.exporting.exporter import Exporter

GROUP = "qrlora_deploy.exporters"
"""The entry-point group of other packages."""

OWN_PACKAGE = "qrlora-deploy"

BUILT_IN = (
    EntryPoint("onnx", "exporters.onnx.exporter:EXPORTER", GROUP),
    EntryPoint("genai", "exporters.genai.exporter:EXPORTER", GROUP),
    EntryPoint("onnx-adapter", "exporters.onnx_adapter.exporter:EXPORTER", GROUP),
    EntryPoint("peft", "exporters.peft.exporter:EXPORTER", GROUP),
    EntryPoint("triton", "exporters.triton.exporter:EXPORTER", GROUP),
)
"""This project's own. They are registered here alone, so that a checkout works without being installed."""

PARTS = ("name", "options", "output", "needs_customer", "shown", "export")
"""What every exporter has."""


def find_exporter(name: str) -> "Exporter":
    """The exporter registered under `name`.

    Raises:
        InputError: there is none, and the message lists those there are; two packages register the
            name, which are both named; or another package's exporter cannot be loaded or is none.
    """
    return _find(name, _registered())


def _find(name: str, registered: Sequence[EntryPoint]) -> "Exporter":
    found = [point for point in registered if point.name == name]
    if not found:
        names = sorted({point.name for point in registered})
        raise InputError(f"{argument('format', name)}: no such exporter; there are {', '.join(names)}")
    if len(found) > 1:
        owners = sorted(f"{_package(point)} ({point.value})" for point in found)
        raise InputError(
            f"{argument('format', name)} is registered more than once, by {' and '.join(owners)}; remove one of them"
        )
    return _load(found[0])


@contextmanager
def faults_named(name: str) -> Iterator[None]:
    """Let what the exporter `name` raises by mistake say which other package it is of.

    Errors of this project's own, of files and of memory pass as they are, and so does everything of its own exporters.

    Raises:
        QrloraError: the exporter of another package failed.
    """
    owners = [_package(point) for point in _registered() if point.name == name and point not in BUILT_IN]
    try:
        yield
    except (QrloraError, OSError, MemoryError):
        raise
    except Exception as error:
        kind = type(error).__name__
        if not owners or kind == "OutOfMemoryError":
            raise
        raise QrloraError(
            f"{argument('format', name)}: the exporter of {owners[0]} failed ({kind}: {first_line(error)}); "
            f"report it to that package"
        ) from error


def all_exporters() -> "list[Exporter]":
    """Every exporter that can be used, in the order of their names; what is wrong with others, `find_exporter` says."""
    usable, registered = [], _registered()
    for name in sorted({point.name for point in registered}):
        try:
            usable.append(_find(name, registered))
        except QrloraError:
            continue
    return usable


def _registered() -> list[EntryPoint]:
    # An older installation of this project registers its own ones too.
    others = [point for point in entry_points(group=GROUP) if _package(point) != OWN_PACKAGE]
    return [*BUILT_IN, *others]


def _load(point: EntryPoint) -> "Exporter":
    exporter: Any
    if point in BUILT_IN:
        exporter = point.load()
        return exporter
    who = f"{argument('format', point.name)}: the exporter of {_package(point)}"
    with library_errors(f"{who} cannot be loaded", InputError):
        exporter = point.load()
    problem = _problem(exporter, point.name)
    if problem:
        raise InputError(f"{who} ({point.value}) {problem}; see docs/extending.md")
    return exporter


def _problem(exporter: Any, name: str) -> str | None:
    """What keeps an object from being the exporter `name`."""
    missing = [part for part in PARTS if not hasattr(exporter, part)]
    if isinstance(exporter, type) or missing:
        return f"is no exporter: it has no {', '.join(missing)}" if missing else "is a class, not an instance of it"
    if exporter.name != name:
        return f"calls itself {exporter.name!r}"
    if exporter.output not in ("file", "folder"):
        return f"writes {exporter.output!r}, which is neither file nor folder"
    if not (isinstance(exporter.options, type) and dataclasses.is_dataclass(exporter.options)):
        return "has options that are no dataclass"
    fields = dataclasses.fields(exporter.options)
    wrong = [field.name for field in fields if "option" not in field.metadata or field.default is dataclasses.MISSING]
    if wrong:
        return f"has options that were not made by `option`: {', '.join(wrong)}"
    taken = [argument(field.name) for field in fields if field.name in RESERVED]
    return f"has options that `export` has itself: {', '.join(taken)}" if taken else None


def _package(point: EntryPoint) -> str:
    """The package that registers an entry point."""
    return point.dist.name if point.dist is not None else OWN_PACKAGE
