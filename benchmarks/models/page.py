"""The page that says family by family what works, from the results alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.models.families import FAMILIES
from benchmarks.models.whole import STEPS

HEAD = """# Which models work

Made by `python -m benchmarks.models`: models of two layers with random weights and the real config of their kind, on a
CPU, with {versions}. Every family goes from `factorize` to each kind of bundle,
or the first command says why not, before training is paid for.

The numbers are largest absolute errors of logits (of embeddings where that is the task), for a batch of four rows with
the customers one, two, the base and two, padded on the left (ModernBERT on the right: on the left its first token,
where it answers, sees no text), against
PyTorch with `W + (Q * c) @ R` that the benchmark computes itself in fp64. The texts
have 15 to 24 tokens, more than any window here. *Effect* is how far customer one moves the logits, about as much as the
answer of a wrong customer is off. *Trunk cache* and *fleet* are the largest difference of a coefficient to a plain
`train`, as a share of the largest coefficient; it grows with every step, and the steps of these models are large. int8
quantises the products; its errors on random weights say nothing about trained models, see
[precision.md](precision.md).

## Families that work

| family | targets | effect | trunk cache | fleet | merge | merged | switchable | fp16 | int8 | padding-free |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""

COLUMNS = ("targets", "effect", *STEPS[1:])


def write_page(path: Path, results: list[dict[str, Any]]) -> None:
    """Write the page.

    Args:
        path: of the page.
        results: of the families, in their order.
    """
    notes: list[str] = []
    whole = [
        result for result in results if "merged" in result.get("facts", {}) or "switchable" in result.get("facts", {})
    ]
    refused = [result for result in results if result not in whole and "absent" not in result]
    absent = [result for result in results if "absent" in result]
    rows = [_row(result, notes) for result in whole]
    text = HEAD.format(versions=_versions(results)) + "\n".join(rows) + "\n"
    if notes:
        text += "\n" + "\n".join(notes) + "\n"
    left = [f"* {result['family']}: {part}" for result in whole for part in result["facts"].get("left out", ())]
    if left:
        text += "\n## What is not adapted unless `--target` names it\n\n" + "\n".join(left) + "\n"
    lines = ["| family | command | what it says |", "| --- | --- | --- |"]
    for result in refused:
        failed: Mapping[str, str] = result["refused"] | result["fault"]
        step, message = next(iter(failed.items()))
        lines.append(f"| {result['family']} | {step} | {_plain(message)} |")
    text += "\n## Families that are refused\n\n" + "\n".join(lines) + "\n"
    if absent:
        text += f"\nNot in this transformers: {', '.join(result['family'] for result in absent)}.\n"
    known = {result["family"] for result in results}
    missing = [family.name for family in FAMILIES if family.name not in known]
    if missing:
        text += f"\nNot run yet: {', '.join(missing)}.\n"
    path.write_text(text, encoding="utf-8")


def _row(result: dict[str, Any], notes: list[str]) -> str:
    return f"| {result['family']} | {' | '.join(_cell(result, column, notes) for column in COLUMNS)} |"


def _cell(result: dict[str, Any], column: str, notes: list[str]) -> str:
    value = result["facts"].get(column)
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float):
        return f"{value:.1e}" if column != "effect" else f"{value:.2f}"
    message = value if value is not None else (result["refused"] | result["fault"]).get(column)
    if message is None:
        return ""
    note = f"{_plain(message)}"
    known = next((index for index, line in enumerate(notes, 1) if line.endswith(f" {note}")), None)
    if known is None:
        notes.append(f"{len(notes) + 1}. {note}")
        known = len(notes)
    return f"({known})"


def _plain(message: str) -> str:
    return message.replace("|", "\\|").replace("\n", " ")


def _versions(results: list[dict[str, Any]]) -> str:
    """Of the packages; more than one where results are of different days."""
    found: dict[str, set[str]] = {}
    for result in results:
        for name, version in result["versions"].items():
            found.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {' and '.join(sorted(versions))}" for name, versions in found.items())
