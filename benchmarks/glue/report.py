"""From the records to a Markdown table and learning curves."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.glue.methods import COMPARED, METHODS
from benchmarks.glue.records import Record
from benchmarks.glue.runs import WARM_UP
from benchmarks.glue.starts import STARTS, WARMED
from benchmarks.glue.tasks import TASKS
from qrlora_deploy.io.files import atomic_file

DPI = 110

START_TITLES = {
    "warmed": "From the warmed-up start (head frozen, except where it is trained by name)",
    "pretrained": "From the pretrained encoder with a fresh head (trained along)",
}


def finished(records: Iterable[Record]) -> list[Record]:
    """The last record of each run that did not fail."""
    return list({record["key"]: record for record in records if "error" not in record}.values())


def render_table(records: Iterable[Record]) -> str:
    """Markdown: one table for each model and start; mean and standard deviation over the seeds, in percent.

    Tasks show their metrics in the order of GLUE; `(n)` is the number of seeds where it is less
    than the most.
    """
    rows = finished(records)
    lines = ["# GLUE", "", _conditions(rows)]
    for model in _unique(rows, "model"):
        for start in STARTS:
            chosen = [row for row in rows if row["model"] == model and row["start"] == start]
            if chosen:
                lines += ["", f"## {model}. {START_TITLES[start]}", "", *_table(chosen)]
    return "\n".join(lines) + "\n"


def _conditions(rows: Sequence[Record]) -> str:
    if not rows:
        return "No finished runs."
    settings = rows[0]["settings"]
    devices, workers = _unique(rows, "device"), _unique(rows, "workers")
    versions = ", ".join(f"{name} {value}" for name, value in sorted(rows[0]["versions"].items()))
    return (
        f"{settings['epochs']} epochs, batch {settings['batch_size']}, at most {settings['max_length']} tokens, "
        f"{'bf16' if settings['bf16'] else 'fp32'}; the score is that of the last step, in percent, mean ± standard "
        f"deviation over the seeds {', '.join(map(str, sorted(set(_unique(rows, 'seed')))))}. "
        f"{', '.join(map(str, devices))}; {', '.join(map(str, workers))} workers shared the machine, so seconds "
        f"compare only within a table. {versions}."
    )


def _table(rows: Sequence[Record]) -> list[str]:
    tasks = [name for name in TASKS if name in _unique(rows, "task")]
    most = max(Counter((row["task"], row["method"]) for row in rows).values())
    heads = [f"{name} ({'/'.join(metric[:4] for metric in TASKS[name].metrics)})" for name in tasks]
    columns = ["method", "parameters", "file, bytes", *heads, "train s", "peak MiB"]
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for method in _names(rows):
        mine = [row for row in rows if row["method"] == method]
        cells = [_score_cell([row for row in mine if row["task"] == task], task, most) for task in tasks]
        warm = method == WARM_UP
        facts = [
            METHODS[method].title if not warm else "the start itself",
            "0" if warm else _number(mine, "trainable_parameters"),
            "0" if warm else _number(mine, "file_bytes"),
            *cells,
            f"{np.mean([row['train_seconds'] for row in mine]):.1f}",
            _peak(mine),
        ]
        lines.append("| " + " | ".join(facts) + " |")
    return lines


def _names(rows: Sequence[Record]) -> list[str]:
    there = _unique(rows, "method")
    return [name for name in (WARM_UP, *METHODS) if name in there]


def _unique(rows: Iterable[Record], name: str) -> list:
    return list(dict.fromkeys(row[name] for row in rows))


def _score_cell(rows: Sequence[Record], task: str, most: int) -> str:
    if not rows:
        return "–"
    parts = []
    for metric in TASKS[task].metrics:
        values = 100 * np.array([row["metrics"][metric] for row in rows])
        spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
        parts.append(f"{values.mean():.1f}{spread}")
    return " / ".join(parts) + (f" ({len(rows)})" if len(rows) < most else "")


def _number(rows: Sequence[Record], name: str) -> str:
    """The mean over tasks and seeds: ranks and file sizes follow the weights, which the warm-up changed."""
    return f"{round(float(np.mean([row[name] for row in rows]))):,}"


def _peak(rows: Sequence[Record]) -> str:
    peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
    return f"{max(peaks) / 2**20:,.0f}" if peaks else "–"


def plot_curves(records: Iterable[Record], folder: Path) -> list[Path]:
    """A picture for each model and task: the dev score by epoch, mean and band over the seeds."""
    rows = [row for row in finished(records) if row["method"] in COMPARED]
    paths = []
    for model in _unique(rows, "model"):
        for task in [name for name in TASKS if name in _unique(rows, "task")]:
            chosen = [row for row in rows if row["model"] == model and row["task"] == task]
            if chosen:
                paths.append(folder / f"curve_{model}_{task}.png")
                _plot(chosen, f"{model}, {task}", paths[-1])
    return paths


def _plot(rows: Sequence[Record], title: str, path: Path) -> None:
    starts = [start for start in STARTS if start in _unique(rows, "start")]
    figure = Figure(figsize=(1.5 + 4.6 * len(starts), 4.2), layout="constrained")
    panels = figure.subplots(1, len(starts), sharey=True, squeeze=False)[0]
    metric = TASKS[rows[0]["task"]].metrics[0]
    for panel, start in zip(panels, starts, strict=True):
        for index, name in enumerate(COMPARED):
            mine = [row for row in rows if row["start"] == start and row["method"] == name]
            if mine:
                _draw(panel, mine, metric, METHODS[name].title, index)
        panel.set(xlabel="epoch", title="warmed-up start" if start == WARMED else "pretrained start")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"{metric} on the dev rows")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="x-small")
    figure.suptitle(title)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def _draw(panel, rows: Sequence[Record], metric: str, label: str, index: int) -> None:  # type: ignore[no-untyped-def]
    """One line with a band; our own methods are drawn solid, the others dashed."""
    values = np.array([[point["metrics"][metric] for point in row["curve"]] for row in rows])
    steps = np.array([point["step"] for point in rows[0]["curve"]])
    epochs = steps / steps[-1] * rows[0]["settings"]["epochs"]
    style = "-" if label.startswith("QR-LoRA") else "--"
    mean = values.mean(axis=0)
    (line,) = panel.plot(epochs, mean, style, color=f"C{index % 10}", linewidth=1.5, label=label)
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        panel.fill_between(epochs, mean - spread, mean + spread, color=line.get_color(), alpha=0.12, linewidth=0)
