"""What a rule of the learning rate gives beside fixed rates, and few coefficients beside other methods, on GLUE.

    python -m benchmarks.rates benchmarks/results/glue/runs.jsonl benchmarks/results/step_size/by_steps.jsonl

The first table has a row for each model, start and placement: the mean score of the five tasks, in percent, at each
rate ("1", "0.5", "0.25": of the rule by the number of coefficients; "steps", "train": of rules), and in brackets how
many runs ended in one answer for every dev row where the start gave more. A cell has all five tasks and one seed. The
second has, for warmed-up starts, each method's mean and standard deviation over the seeds, and the mean difference to
training the head alone from the very same starts, with its standard error.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from benchmarks.glue.records import Record, read_records
from benchmarks.glue.runs import WARM_UP
from benchmarks.glue.starts import WARMED
from benchmarks.glue.tasks import TASKS

OTHER_NAMES = {"qr-all-half": "qr-all@0.5", "qr-all-quarter": "qr-all@0.25", "qr-all": "qr-all@1", "qr-q4": "qr-q4@1"}
"""Of methods that are placements at a rate, too."""

BASELINE = "head"


class Key(NamedTuple):
    """What a run is of."""

    model: str
    start: str
    method: str
    task: str
    seed: int


class Run(NamedTuple):
    """A score in percent, whether the run ended in one answer that it had not begun with, and trained parameters."""

    score: float
    collapsed: bool
    trained: int


Runs = dict[Key, Run]


def read_runs(paths: Iterable[Path]) -> Runs:
    """The runs of several records; where two have the same one, that of the later record."""
    found = {}
    for record in (record for path in paths for record in read_records(path)):
        if "error" not in record and "probe" not in record:
            name: str = record["method"]
            method = OTHER_NAMES.get(name, name)
            key = Key(record["model"], record["start"], method, record["task"], record["seed"])
            found[key] = _run(record)
    return found


def _run(record: Record) -> Run:
    task = record["task"]
    collapsed = _has_one_answer(record["metrics"]) and not _has_one_answer(record["curve"][0]["metrics"])
    return Run(100 * record["metrics"][TASKS[task].metrics[0]], collapsed, record["trainable_parameters"])


def _has_one_answer(metrics: Record) -> bool:
    # Older records count no classes: there Matthews' correlation of one answer is 0.
    return bool(metrics["classes"] == 1 if "classes" in metrics else metrics.get("matthews") == 0.0)


def ways_table(runs: Runs) -> str:
    """Rows of placements, columns of rates."""
    cells: dict[tuple[str, str, str, int], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for key, run in runs.items():
        place, at, way = key.method.partition("@")
        if at:
            cells[key.model, key.start, place, key.seed][way].append(run)
    ways = sorted({way for row in cells.values() for way in row})
    lines = [_row(["model", "start", "placement", "seed", *ways]), _row(["---"] * (4 + len(ways)))]
    for (model, start, place, seed), row in sorted(cells.items()):
        shown = [_mean_of_tasks(row[way]) for way in ways]
        if any(cell != "–" for cell in shown):
            lines.append(_row([model, start, place, str(seed), *shown]))
    return "\n".join(lines)


def _mean_of_tasks(found: Sequence[Run]) -> str:
    if len(found) < len(TASKS):
        return "–"
    collapsed = sum(run.collapsed for run in found)
    return f"{mean(run.score for run in found):.1f}" + (f" ({collapsed})" if collapsed else "")


def collapses(runs: Runs) -> str:
    """How many runs of each way ended in one answer, of how many."""
    counts: dict[str, list[bool]] = defaultdict(list)
    for key, run in runs.items():
        if "@" in key.method:
            counts[key.method.partition("@")[2]].append(run.collapsed)
    return "\n".join(f"{way}: {sum(found)} of {len(found)} runs ended in one answer" for way, found in counts.items())


def methods_table(runs: Runs, model: str) -> str:
    """Methods from the warmed-up start of one model, those with fewer parameters first."""
    own = {key: run for key, run in runs.items() if key.model == model and key.start == WARMED}
    trained: dict[str, int] = {}
    for key, run in own.items():
        trained[key.method] = max(run.trained, trained.get(key.method, 0))
    trained[WARM_UP] = 0
    lines = [_row(["method", "trained", "seeds", *TASKS, "mean"]), _row(["---"] * (4 + len(TASKS)))]
    for method in sorted(trained, key=lambda name: (trained[name], name)):
        by_task = {task: _seeds(own, method, task) for task in TASKS}
        seeds = sorted(set.intersection(*(set(found) for found in by_task.values())))
        if not seeds:
            continue
        cells = [_cell(own, found, task, seeds) for task, found in by_task.items()]
        whole = mean(found[seed].score for found in by_task.values() for seed in seeds)
        lines.append(_row([method, f"{trained[method]:,}", _range(seeds), *cells, f"{whole:.1f}"]))
    return "\n".join(lines)


def _seeds(runs: Runs, method: str, task: str) -> dict[int, Run]:
    return {key.seed: run for key, run in runs.items() if (key.method, key.task) == (method, task)}


def _cell(runs: Runs, found: dict[int, Run], task: str, seeds: Sequence[int]) -> str:
    """Mean (standard deviation), and the paired difference to the baseline ± its standard error."""
    scores = [found[seed].score for seed in seeds]
    text = f"{mean(scores):.1f} ({stdev(scores):.1f})" if len(scores) > 1 else f"{scores[0]:.1f}"
    base = _seeds(runs, BASELINE, task)
    gains = [found[seed].score - base[seed].score for seed in seeds if seed in base]
    if len(gains) < 2 or not any(gains):
        return text
    return f"{text} {mean(gains):+.1f} ± {stdev(gains) / len(gains) ** 0.5:.1f}"


def _range(seeds: Sequence[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parse, read and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    runs = read_runs(parser.parse_args().records)
    print(ways_table(runs), collapses(runs), sep="\n\n")
    for model in sorted({key.model for key in runs}):
        print(f"\n## {model}\n\n{methods_table(runs, model)}")


if __name__ == "__main__":
    main()
