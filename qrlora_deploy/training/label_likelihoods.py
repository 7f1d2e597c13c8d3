"""Held-out rows whose answers are labels: which label a decoder finds likeliest, whatever it would write."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.turns import COMPLETION, Turn
from qrlora_deploy.tasks.answer_rows import answer_rows
from qrlora_deploy.tasks.causal_lm import NLL, CausalLM
from qrlora_deploy.training.precision import mixed_precision
from qrlora_deploy.training.rows import Rows

MAX_LABELS = 20
MAX_ROWS = 2_000
"""Rows times labels: each is read once, before training and after it."""

METRIC = "label_accuracy"


@dataclass(frozen=True)
class LabelRows:
    """Every held-out prompt with every label.

    Attributes:
        rows: of the first prompt with each label, then of the second one, and so on.
        right: the number of the label of each held-out row.
        labels: how many there are.
    """

    rows: Rows
    right: list[int]
    labels: int

    def score(self, model: Any, collate: Callable[[Rows], Any], batch_size: int) -> dict[str, float]:
        """The share of rows whose own label has the largest likelihood, the end of text included, by `METRIC`."""
        device = next(model.parameters()).device
        training = model.training
        model.eval()

        def graded(rows: Rows) -> torch.Tensor:
            batch = {name: tensor.to(device) for name, tensor in collate(rows).items()}
            labels = batch.pop("labels")
            with mixed_precision(device):
                return CausalLM().graded(model, batch, labels)

        found = self.score_by(graded, batch_size)
        model.train(training)
        return found

    @torch.no_grad()
    def score_by(self, graded: Callable[[Rows], torch.Tensor], batch_size: int) -> dict[str, float]:
        """The same by what gives `CausalLM.graded` of some rows."""
        parts = (self.rows[start : start + batch_size] for start in range(0, len(self.rows), batch_size))
        losses = [graded(part)[..., NLL].sum(1).cpu() for part in parts]
        found = torch.cat(losses).reshape(-1, self.labels).argmin(1)
        return {METRIC: round(float((found == torch.tensor(self.right)).float().mean()), 6)}


def label_rows(tokenizer: Any, train: Examples, evaluation: Examples | None, max_length: int) -> LabelRows | None:
    """Held-out prompts with every label that rows of `train` have; None where answers are no labels.

    They are where there are `MAX_LABELS` of them at most, each of several rows, and held-out rows have no others.
    """
    answers = _completions(train)
    held_out = None if evaluation is None else _completions(evaluation)
    if not answers or not held_out or evaluation is None or evaluation.turns is None:
        return None
    labels = sorted(set(answers))
    few = 2 <= len(labels) <= min(MAX_LABELS, len(answers) // 2) and len(labels) * len(held_out) <= MAX_ROWS
    if not few or not set(held_out) <= set(labels):
        return None
    turns = [(prompt, Turn(COMPLETION, label)) for prompt, _ in evaluation.turns for label in labels]
    empty = [""] * len(turns)
    made = answer_rows(tokenizer, replace(evaluation, texts=empty, labels=empty, turns=turns), max_length)
    return None if made.cut else LabelRows(made.rows, [labels.index(label) for label in held_out], len(labels))


def _completions(examples: Examples) -> list[str]:
    """The answers of plain rows; none where there are chats."""
    turns = examples.turns or []
    return [row[1].content for row in turns] if all(row[-1].role == COMPLETION for row in turns) else []
