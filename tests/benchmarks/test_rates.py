"""The tables of rates: which runs have a cell, what counts as a collapse, and differences between the same starts."""

import json
from pathlib import Path
from typing import Any

from benchmarks.rates import collapses, methods_table, read_runs, ways_table

METRICS = {"RTE": "accuracy", "MRPC": "accuracy", "CoLA": "matthews", "STS-B": "pearson", "SST-2": "accuracy"}


def lines_of(method: str, seed: int, score: float, **changes: dict[str, Any]) -> list[dict[str, Any]]:
    """A record for each task; `changes` are of CoLA's."""
    common = {"model": "mpnet", "start": "warmed", "method": method, "seed": seed, "trainable_parameters": 641}
    lines = []
    for task, metric in METRICS.items():
        own = {"metrics": {metric: score}, "curve": [{"metrics": {metric: 0.5}}]} | (changes if task == "CoLA" else {})
        lines.append(common | own | {"task": task, "key": f"{method}/{task}/{seed}"})
    return lines


def write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    path = folder / "runs.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_a_rate_has_a_cell_where_all_tasks_are_there_and_says_what_collapsed(tmp_path: Path) -> None:
    gone: Any = {"matthews": 0.0, "classes": 1}
    lines = lines_of("qr-q4", 0, 0.6) + lines_of("qr-q4@steps", 0, 0.5, metrics=gone)
    lines += lines_of("qr-q4@0.25", 0, 0.5, metrics=gone, curve=[{"metrics": gone}]) + lines_of("qr-q4@0.5", 0, 0.7)[:4]
    runs = read_runs([write(tmp_path, lines)])
    assert ways_table(runs).splitlines()[2:] == ["| mpnet | warmed | qr-q4 | 0 | 40.0 | – | 60.0 | 40.0 (1) |"]
    assert "steps: 1 of 5 runs" in collapses(runs) and "0.25: 0 of 5 runs" in collapses(runs)


def test_a_method_is_held_against_the_head_from_the_same_starts(tmp_path: Path) -> None:
    lines = [line for seed, score in enumerate((0.5, 0.6, 0.9)) for line in lines_of("head", seed, score)]
    lines += lines_of("qr-q4@train", 0, 0.51) + lines_of("qr-q4@train", 1, 0.63)
    table = methods_table(read_runs([write(tmp_path, lines)]), "mpnet").splitlines()
    # Seeds 0 and 1 gain 1 and 3 points: 2 in the mean, and the root of 2 over the root of 2 is its standard error.
    assert table[3].startswith("| qr-q4@train | 641 | 0, 1 | 57.0 (8.5) +2.0 ± 1.0 |")
    assert table[2].startswith("| head | 641 | 0, 1, 2 | 66.7 (20.8) |") and table[2].endswith("| 66.7 |")
