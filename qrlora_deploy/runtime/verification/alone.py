"""Decoders: every row of a mixed batch against its own answer alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qrlora_deploy.errors import CheckFailed, first_line
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE
from qrlora_deploy.runtime.verification.bounds import NEAR_TIES
from qrlora_deploy.runtime.verification.forced import ForcedSteps, check_forced
from qrlora_deploy.runtime.verification.reference import Case
from qrlora_deploy.runtime.verification.report import ForcedReport

MOST_TOKENS, LEAST_TOKENS = 200, 16
"""Of each row's answer."""

MOST_BYTES = 2**39
"""Weights that all runs may read together. A run reads all weights once, whatever the batch, and so decides the time:
a model of 0.5 GB gets 200 tokens in a minute or two of a CPU, one of 4 GB 25, and none fewer than 16."""

DESCRIPTION = "rows beside others and alone"
"""Of the progress."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Alone:
    """What came of it.

    Attributes:
        tokens: of each answer.
        different: the first token that a row wrote otherwise than alone, as text; empty where there is none.
    """

    tokens: int
    different: str = ""


def tokens_for(weight_bytes: int, rows: int, longest: int, positions: int) -> int:
    """How many tokens are written: a run a token for the batch, and one for each row.

    Args:
        weight_bytes: that a run reads.
        rows: of the batch.
        longest: tokens of the longest prompt.
        positions: that the model knows.
    """
    fitting = MOST_BYTES // max(1, weight_bytes * (rows + 1))
    return min(MOST_TOKENS, max(LEAST_TOKENS, fitting), positions - longest)


def check_alone(
    session: Any, case: Case, precision: str, weight_bytes: int, positions: int, progress: Progress | None = None
) -> Alone:
    """Let all rows of a case write greedily in one batch, and then each alone: the tokens must be the same.

    They may differ where the alternatives are a near tie: sums have another order in a batch of another size.

    Raises:
        CheckFailed: the graph does not run.
    """
    lengths = case.inputs["attention_mask"].sum(axis=1)
    rows, longest = case.inputs["input_ids"].shape
    tokens = tokens_for(weight_bytes, rows, longest, positions)
    tie = NEAR_TIES[precision] * float(case.logits.std())
    further = {name: case.inputs[name] for name in (TABLE, SLOT) if name in case.inputs}

    def told(answers: int) -> None:
        if progress is not None:
            progress(DESCRIPTION, answers, rows + 1)

    try:
        told(0)
        written = _together(session, case.inputs["input_ids"], lengths, tokens, further)
        for row in range(rows):
            told(row + 1)
            own = further | ({SLOT: further[SLOT][row : row + 1]} if SLOT in further else {})
            prompt = case.inputs["input_ids"][row : row + 1, : lengths[row]]
            step = _first_other(session, prompt, written[row], own, tie)
            if step is not None:
                return Alone(tokens, f"row {row} of {case.name!r} writes another token {step + 1} than it does alone")
    # ONNX Runtime's exceptions share no base class of their own.
    except Exception as error:
        raise CheckFailed(f"the model does not run on {case.name!r}: {first_line(error)}") from error
    return Alone(tokens)


def check_decoder(
    session: Any,
    reference: Sequence[Case],
    precision: str,
    model: Path,
    positions: int,
    progress: Progress | None = None,
) -> ForcedReport:
    """A decoder against PyTorch's logits, and every row against itself alone.

    Args:
        session: of the graph.
        reference: what PyTorch gives.
        precision: of the graph.
        model: its file, whose weights decide how many tokens are written.
        positions: that the model knows.
        progress: called with (description, done, total) as answers are written.

    Raises:
        CheckFailed: it does not run.
    """
    report = check_forced(session, reference, precision)
    for case in reference:
        found = check_alone(session, case, precision, weights_of(model), positions, progress)
        report = replace(report, alone=found.different, alone_tokens=found.tokens)
        if found.different:
            break
    return report


def weights_of(model: Path) -> int:
    """Bytes of a graph and of its weights beside it."""
    return sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*"))


def _together(
    session: Any, ids: np.ndarray, lengths: np.ndarray, tokens: int, further: Mapping[str, np.ndarray]
) -> np.ndarray:
    """`[rows, tokens]`: what all rows write side by side."""
    rows, longest = ids.shape
    steps = ForcedSteps(session, rows, longest + tokens, further)
    places = np.arange(rows)
    written = [steps.run(ids, lengths, longest, places * longest + lengths - 1).argmax(axis=-1)]
    for step in range(1, tokens):
        written.append(steps.run(written[-1][:, None], lengths + step, steps.buffer, places).argmax(axis=-1))
    return np.stack(written, axis=1)


def _first_other(
    session: Any, prompt: np.ndarray, written: np.ndarray, further: Mapping[str, np.ndarray], tie: float
) -> int | None:
    """The first token that a row alone would not write behind the ones before it; None: there is none."""
    length = prompt.shape[1]
    steps = ForcedSteps(session, 1, length + len(written), further)
    logits = steps.run(prompt, np.array([length]), length, np.array([length - 1]))
    for step, token in enumerate(written.tolist()):
        if not logits[0].max() - logits[0, token] <= tie:
            return step
        if step + 1 < len(written):
            valid = np.array([length + step + 1])
            logits = steps.run(np.array([[token]]), valid, steps.buffer, np.zeros(1, np.int64))
    return None
