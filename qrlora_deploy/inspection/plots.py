"""Pictures of a basis and of a customer."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.inspection.describe import direction_norms
from qrlora_deploy.io.files import atomic_file
from qrlora_deploy.rank_rules.energy_share import EnergyShare

SUFFIXES = (".pdf", ".png", ".svg")

LEGEND_ENTRIES = 12
"""More names than this would hide the curves."""


def check_plot_path(path: Path) -> None:
    """Refuse a name of a picture before the work starts.

    Raises:
        InputError: its suffix is not one of `SUFFIXES`.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: the name of a plot must end with {', '.join(SUFFIXES)}")


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
    if isinstance(basis.rule, EnergyShare):
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
    """Draw what a customer learnt: which directions, and in which layers.

    With the basis: every coefficient by layer and direction, the norm of each layer's update, and
    how the update is spread over the directions. Without it, the values as they stand in the file.

    Raises:
        InputError: the suffix or the folder of `path` is wrong, or the basis is another.
    """
    check_plot_path(path)
    if basis is None:
        _save(_plain_values(coefficients.values), path)
        return
    coefficients.check_fits(basis)
    names = _short_names(basis.names)
    moved = direction_norms(basis, coefficients.values)
    height = max(4.5, 0.22 * len(names))
    figure = Figure(figsize=(12, height), layout="constrained")
    grid, bars, spread = figure.subplots(1, 3, width_ratios=[5, 3, 3])
    # On a tall page the curves would be stretched out of shape.
    spread.set_box_aspect(1.2)
    spread.set_anchor("N")
    _draw_values(figure, grid, list(basis.split(coefficients.values).values()), names)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(names)))
    rows = np.arange(len(names))
    bars.barh(rows, [float(np.linalg.norm(part)) for part in moved.values()], color=colours)
    bars.set_yticks([])  # its rows are those of the grid
    bars.set_ylim(len(names) - 0.5, -0.5)
    bars.set(xlabel="‖Q diag(c) R‖", title="Update by layer")
    _draw_spread(spread, list(moved.values()), names, colours)
    _save(figure, path)


def _plain_values(values: np.ndarray) -> Figure:
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.vlines(np.arange(len(values)), 0, values, linewidth=0.8)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="position in the file", ylabel="c", title=f"{len(values)} coefficients (basis not found)")
    return figure


def _short_names(names: list[str]) -> list[str]:
    """Module paths without the parts at their beginning that all of them share."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return [".".join(part[shared:]) for part in parts]


def _draw_values(figure: Figure, axes: Any, parts: list[np.ndarray], names: list[str]) -> None:
    """One row a layer, one column a direction; white is zero and grey is past the layer's rank."""
    widest = max(len(part) for part in parts)
    values = np.full((len(parts), widest), np.nan)
    for row, part in enumerate(parts):
        values[row, : len(part)] = part
    # A single large coefficient would leave all others white.
    bound = float(np.nanquantile(np.abs(values), 0.99)) or 1.0
    axes.set_facecolor("lightgrey")
    image = axes.imshow(
        values,
        cmap="RdBu_r",
        vmin=-bound,
        vmax=bound,
        aspect="auto",
        interpolation="none",
        extent=(0.5, widest + 0.5, len(parts) - 0.5, -0.5),
    )
    axes.set_yticks(np.arange(len(parts)), names, fontsize="x-small")
    axes.set(xlabel="direction, in pivot order", title=f"{sum(map(len, parts))} coefficients")
    figure.colorbar(
        image,
        ax=axes,
        extend="both",
        label="c",
        shrink=min(1.0, 6 / figure.get_figheight()),
        pad=0.02,
        anchor=(0.0, 1.0),
    )


def _draw_spread(axes: Any, parts: list[np.ndarray], names: list[str], colours: np.ndarray) -> None:
    """Share of the update's squared norm in the first directions of each layer."""
    for part, name, colour in zip(parts, names, colours, strict=True):
        energies = np.square(part)
        total = energies.sum()
        if total:
            share = np.concatenate([[0.0], np.cumsum(energies) / total])
            axes.plot(np.linspace(0, 1, len(share)), share, color=colour, linewidth=1, label=name)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
    if len(parts) <= LEGEND_ENTRIES and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small")
    axes.set(
        xlabel="share of the directions",
        ylabel="share of the update",
        title="Spread (dashed: even)",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as temporary:
        # The temporary name has another suffix, so the format is given.
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
