"""The figures of a report, as SVG that takes its ink from the page around it."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.report_parts import TTFT, Measurement, shape_name

INK, FAINT = "#010203", "#040506"
"""Stand for the page's colours of text and of lines in the background, and are replaced by them."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b61c4", "#8a8a8a")
"""After Okabe and Ito: told apart with any eyes, and seen on white and on black."""

SMALL = 10.5
"""Points, of legends and names."""

NAME = 26
"""Letters of a name that is shown whole."""

BESIDE = 18
"""Letters of the longest entry of a legend in two columns."""

LEGEND_ROW = 0.2
"""Inches that an entry of a legend takes."""

WIDTH = 4.8
"""Inches. A phone shows it at two thirds of that, and letters must be legible there."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qrlora-bench",
    "font.family": "sans-serif",
    "font.size": 12,
    # Names of folders may hold dollar signs.
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def draw_figures(report: Report) -> dict[str, str]:
    """SVG by title, for all that was measured; a scenario that was not has no figure."""
    colours = {subject.name: COLOURS[index % len(COLOURS)] for index, subject in enumerate(report.subjects)}
    figures: dict[str, str] = {}
    with matplotlib.rc_context(STYLE):
        singles = list(report.of("single-stream"))
        for shape in dict.fromkeys(item.shape for item in singles):
            drawn = _latencies([item for item in singles if item.shape == shape], colours)
            figures[f"Latency of single runs, {shape}"] = _svg(drawn)
        firsts = [item for item in report.of("generation") if item.variant == TTFT]
        for shape in dict.fromkeys(item.shape for item in firsts):
            drawn = _latencies([item for item in firsts if item.shape == shape], colours)
            figures[f"Time to first token, {shape}"] = _svg(drawn)
        for item in dict.fromkeys(item.length for item in report.of("offline")):
            chosen = [other for other in report.of("offline") if other.length == item]
            figures[f"Throughput by batch, {f'{item} tokens' if item else 'texts'}"] = _svg(
                _throughput(chosen, colours)
            )
        if any(report.of("server")):
            figures["Latency by arrival rate"] = _svg(_rates(report, colours))
        if report.comparisons:
            figures["Ratio to the baseline"] = _svg(_ratios(report, colours))
    return figures


def _latencies(items: Sequence[Measurement], colours: dict[str, str]) -> Figure:
    """Share of runs that took longer: the tail is where users suffer, so it gets the room."""
    figure, axes = _axes(3.4)
    for item in items:
        samples = np.sort(item.samples)
        shares = 100 * (1 - np.arange(len(samples)) / len(samples))
        axes.step(samples, shares, where="post", color=colours[item.subject], linewidth=1.8, label=short(item.subject))
    axes.set(xscale="log", yscale="log", xlabel="milliseconds", ylabel="runs that took longer")
    for share, name in ((50, "p50"), (10, "p90"), (1, "p99")):
        if share >= min(100 / len(item.samples) for item in items):
            axes.axhline(share, color=FAINT, linewidth=0.8, linestyle=":")
            axes.annotate(name, (1.005, share), xycoords=("axes fraction", "data"), va="center", fontsize=SMALL)
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis, " %")
    _legend(axes)
    return figure


def _throughput(items: Sequence[Measurement], colours: dict[str, str]) -> Figure:
    figure, axes = _axes(3.2)
    for name in dict.fromkeys(item.subject for item in items):
        chosen = sorted((item for item in items if item.subject == name), key=lambda item: item.batch)
        batches = [item.batch for item in chosen]
        middle = [float(np.median(item.samples)) for item in chosen]
        spread = [
            [value - float(np.quantile(item.samples, 0.05)) for value, item in zip(middle, chosen, strict=True)],
            [float(np.quantile(item.samples, 0.95)) - value for value, item in zip(middle, chosen, strict=True)],
        ]
        axes.errorbar(batches, middle, yerr=spread, color=colours[name], marker="o", capsize=3, label=short(name))
    axes.set(xscale="log", xlabel="batch, rows", ylabel="rows per second", ylim=(0, None))
    axes.set_xticks(sorted({item.batch for item in items}))
    _plain_ticks(axes.xaxis)
    _legend(axes)
    return figure


def _rates(report: Report, colours: dict[str, str]) -> Figure:
    figure, axes = _axes(3.4)
    items = list(report.of("server"))
    for name in dict.fromkeys(item.subject for item in items):
        chosen = sorted((item for item in items if item.subject == name), key=lambda item: item.offered_per_s or 0)
        kept = [item for item in chosen if not item.saturated]
        for share, style, statistic in ((0.5, ":", "p50"), (0.99, "-", "p99")):
            rates = [item.offered_per_s or 0.0 for item in kept]
            values = [float(np.quantile(item.samples, share)) for item in kept]
            label = short(name) if statistic == "p99" else None
            axes.plot(rates, values, style, color=colours[name], marker="o", markersize=4, label=label)
        for item in chosen:
            if item.saturated:
                axes.axvline(item.offered_per_s or 0, color=colours[name], linewidth=1, linestyle=(0, (1, 3)))
    for budget in {capacity.budget_ms for capacity in report.capacities}:
        axes.axhline(budget, color=INK, linewidth=1, linestyle="--", label=f"budget {budget:.3g} ms")
    axes.set(
        yscale="log",
        xlabel="requests per second, Poisson"
        + ("\n(upright: the queue grew)" if any(i.saturated for i in items) else ""),
        ylabel="milliseconds: p99, dotted p50",
    )
    _plain_ticks(axes.yaxis)
    _legend(axes)
    return figure


def _ratios(report: Report, colours: dict[str, str]) -> Figure:
    items = [item for item in report.comparisons if item.subject in colours]
    figure, axes = _axes(0.9 + 0.48 * len(items))
    for row, item in enumerate(items):
        low, high = item.ratio.value - item.ratio.low, item.ratio.high - item.ratio.value
        axes.errorbar(
            item.ratio.value, row, xerr=[[low], [high]], color=colours[item.subject], marker="o", capsize=3, linewidth=2
        )
    axes.axvline(1.0, color=INK, linewidth=0.8)
    names = [
        f"{short(item.subject)}:\n{item.scenario} {shape_name(item.batch, item.length)} {item.statistic}"
        for item in items
    ]
    axes.set_yticks(range(len(items)), names, fontsize=SMALL)
    axes.set_ylim(len(items) - 0.5, -0.5)
    axes.set(xlabel=f"by {', '.join(dict.fromkeys(short(item.baseline) for item in items))}\nwith the 95 % interval")
    return figure


def short(name: str) -> str:
    """A name with its middle left out where it is long: beginnings and ends tell bundles apart."""
    half = (NAME - 1) // 2
    return name if len(name) <= NAME else f"{name[:half]}…{name[-half:]}"


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.grid(True, linewidth=0.4, which="major")
    axes.set_axisbelow(True)
    return figure, axes


def _plain_ticks(axis: Any, unit: str = "") -> None:
    """5 and 50 instead of powers of ten."""
    axis.set_major_formatter(lambda value, _position: f"{value:g}{unit}")
    if axis.get_scale() == "log":
        axis.set_minor_locator(NullLocator())
        if not isinstance(axis.get_major_locator(), FixedLocator):
            axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=8))


def _legend(axes: Axes) -> None:
    """Above the axes, for which the figure grows: no place inside is free for certain."""
    names = [str(artist.get_label()) for artist in axes.get_legend_handles_labels()[0]]
    columns = 2 if max(map(len, names), default=0) <= BESIDE else 1
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=columns, fontsize=SMALL, borderaxespad=0)
    figure = axes.get_figure(root=True)
    if figure is not None:
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * -(-len(names) // columns))


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    return text.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
