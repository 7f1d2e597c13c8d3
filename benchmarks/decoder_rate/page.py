"""Runs as tables."""

from typing import Any

import numpy as np

from benchmarks.decoder_rate.plan import FACTORS, LORA_RATES
from qrlora_deploy.training.settings import default_rate


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: exact match in percent, mean and spread over the seeds; coefficients by factor, LoRA by rate."""
    parts = []
    for method, column, values in (
        ("coefficients", "factor", sorted(FACTORS)),
        ("lora", "rate", sorted({rate for rates in LORA_RATES.values() for rate in rates})),
    ):
        of_method = [run for run in runs if run["method"] == method]
        head = ["task", "layers", method, "seeds", *(f"{value:g}{' x' * (column == 'factor')}" for value in values)]
        lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
        for task, setup, count in sorted({(run["task"], run["setup"], run["trained"]) for run in of_method}):
            mine = [run for run in of_method if (run["task"], run["setup"]) == (task, setup)]
            cells = [_cell([run for run in mine if run[column] == value]) for value in values]
            seeds = len({run["seed"] for run in mine})
            rate = f" (default of classifiers {default_rate(count)})" if method == "coefficients" else ""
            lines.append(f"| {task} | {setup} | {count:,}{rate} | {seeds} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return "–"
    found = [100 * run["metrics"]["exact_match"] for run in runs]
    nll = np.mean([run["metrics"]["nll"] for run in runs])
    return f"{np.mean(found):.1f} ± {np.std(found):.1f} ({nll:.3f})"
