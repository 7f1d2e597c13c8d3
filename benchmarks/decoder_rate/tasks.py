"""Rows of the tasks: prompts with completions."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qrlora_deploy.data.examples import Examples, read_examples
from qrlora_deploy.data.sample import as_prompts, held_out_examples, train_examples
from qrlora_deploy.data.turns import COMPLETION, PROMPT, Turn

TRAIN_ROWS, HELD_OUT_ROWS = 600, 300


@dataclass(frozen=True)
class Task:
    """Prompts with completions."""

    name: str
    train: Examples
    held_out: Examples


def banking() -> Task:
    """The quickstart's first customer, whose labels are written out."""
    return Task(
        "banking",
        _drawn(as_prompts(train_examples("banking")), TRAIN_ROWS),
        _drawn(as_prompts(held_out_examples("banking")), HELD_OUT_ROWS),
    )


def read_task(text: str) -> Task:
    """NAME=TRAIN,DEV: files of prompts with completions, or GLUE's `.tsv` of SST-2."""
    name, _, files = text.partition("=")
    rows, held_out = (_read(Path(file)) for file in files.split(","))
    return Task(name, _drawn(rows, TRAIN_ROWS), _drawn(held_out, HELD_OUT_ROWS))


def _read(file: Path) -> Examples:
    if file.suffix != ".tsv":
        return read_examples(file, written=True)
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    words = {"0": " negative", "1": " positive"}
    return _examples(
        [(f"Review: {row['sentence'].strip()}\nSentiment:", words[row["label"]]) for row in rows], file.name
    )


def _examples(pairs: list[tuple[str, str]], name: str) -> Examples:
    turns = [(Turn(PROMPT, prompt), Turn(COMPLETION, completion)) for prompt, completion in pairs]
    return Examples([""] * len(turns), None, [""] * len(turns), name, turns=turns)


def _drawn(examples: Examples, count: int) -> Examples:
    return examples.take(np.random.default_rng(0).permutation(len(examples))[:count].tolist())
