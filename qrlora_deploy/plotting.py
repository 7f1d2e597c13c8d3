"""Pictures of a basis and of a customer."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from qrlora_deploy.basis import Basis
from qrlora_deploy.coefficients import Coefficients
from qrlora_deploy.errors import InputError
from qrlora_deploy.files import atomic_file

SUFFIXES = (".pdf", ".png", ".svg")

LEGEND_ENTRIES = 12
"""More names than this would hide the curves."""


def check_plot_path(path: Path) -> None:
    """Refuse a name of a picture before the work starts.

    Raises:
        InputError: its suffix is not one of `SUFFIXES`.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot {path}: the name must end with {', '.join(SUFFIXES)}")


def plot_basis(basis: Basis, path: Path) -> None:
    """Draw the cumulated energy of every target, its rank marked, and the ranks as bars.

    Raises:
        InputError: the suffix or the folder of `path` is wrong.
    """
    check_plot_path(path)
    figure = Figure(figsize=(12, max(4.5, 0.22 * len(basis.targets))), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(basis.targets)))
    for target, colour in zip(basis.targets, colours, strict=True):
        energies = np.square(target.diagonal.astype(np.float64))
        total = energies.sum()
        shares = np.cumsum(energies) / total if total else np.ones_like(energies)
        curves.plot(np.arange(1, len(shares) + 1), shares, color=colour, linewidth=1, label=target.name)
        curves.plot(target.rank, shares[target.rank - 1], "o", color=colour, markersize=3)
    if basis.rule.tau is not None:
        curves.axhline(basis.rule.tau, color="grey", linewidth=0.8, linestyle="--")
    if len(basis.targets) <= LEGEND_ENTRIES:
        curves.legend(fontsize="x-small")
    curves.set(xlabel="directions kept", ylabel="share of the energy", ylim=(0, 1.02), title="Energy (dot: rank)")
    rows = np.arange(len(basis.targets))
    bars.barh(rows, [target.rank for target in basis.targets], color=colours)
    bars.set_yticks(rows, basis.names, fontsize="x-small")
    bars.invert_yaxis()
    bars.set(xlabel="rank", title=f"{basis.total_rank} coefficients")
    _save(figure, path)


def plot_coefficients(coefficients: Coefficients, basis: Basis | None, path: Path) -> None:
    """Draw a customer's coefficients, by layer where the basis is known.

    Raises:
        InputError: the suffix or the folder of `path` is wrong, or the basis is another.
    """
    check_plot_path(path)
    if basis is not None:
        coefficients.check_fits(basis)
        parts = basis.split(coefficients.values)
    else:
        parts = {"all layers (basis not found)": coefficients.values}
    figure = Figure(figsize=(12, max(4.5, 0.22 * len(parts))), layout="constrained")
    values, norms = figure.subplots(1, 2)
    start = 0
    for index, part in enumerate(parts.values()):
        values.vlines(np.arange(start, start + len(part)), 0, part, linewidth=0.8, color=f"C{index % 10}")
        start += len(part)
    values.set(xlabel="position, layer after layer", ylabel="coefficient", title=f"{start} coefficients")
    rows = np.arange(len(parts))
    lengths = [float(np.linalg.norm(part)) for part in parts.values()]
    norms.barh(rows, lengths, color=[f"C{index % 10}" for index in rows])
    norms.set_yticks(rows, list(parts), fontsize="x-small")
    norms.invert_yaxis()
    norms.set(xlabel="norm", title="Norm by layer")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as temporary:
        # The temporary name has another suffix, so the format is given.
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
