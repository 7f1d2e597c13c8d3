"""The outcome of a parity check, and how the effects of customers are compared."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from qrlora_deploy.errors import CheckFailed, argument
from qrlora_deploy.runtime.verification.bounds import BOUNDS, DECODER_BOUNDS, Bounds


@dataclass(frozen=True)
class ParityReport:
    """The outcome of a parity check.

    Attributes:
        max_abs_error: largest difference of two logits.
        bound: what it may be, for fp32 `1e-4 * max(1, max |logit|)`.
        label_agreement: mean over the rows of `Task.agreement`: the share of rows with the same label,
            or of tokens with the same tag.
        cases: number of batches.
        rows: number of rows in them.
        worst: the row with the largest difference.
        errors: largest difference in each case, by its name.
        precision: of the graph.
        effect_correlation: cosine of `logits(c) - logits(0)` in the graph and in PyTorch, over all
            logits of all rows; not centred, since a shift of every logit is an effect too. None
            where PyTorch knows of no effect.
        effect_error: largest difference of the two, relative to the largest effect.
    """

    max_abs_error: float
    bound: float
    label_agreement: float
    cases: int
    rows: int
    worst: str
    errors: dict[str, float] = field(default_factory=dict)
    precision: str = "fp32"
    effect_correlation: float | None = None
    effect_error: float | None = None

    _answers: ClassVar[str] = "labels"

    @property
    def passed(self) -> bool:
        """Whether everything is within its bound; NaN is not."""
        return not self._failures()

    def raise_if_failed(self) -> None:
        """Raise unless the check passed.

        Raises:
            CheckFailed: naming the numbers that are out of bounds, the bounds and the worst row.
        """
        failures = self._failures()
        if failures:
            raise CheckFailed(
                f"{'; '.join(failures)} ({self.precision}, {self.rows} inputs, worst: {self.worst})"
                + ("" if self.precision == "fp32" else f"; choose another {argument('precision')}")
            )

    @property
    def _bounds(self) -> Bounds:
        return BOUNDS[self.precision]

    def _failures(self) -> list[str]:
        failures = []
        if not self.max_abs_error <= self.bound:
            failures.append(f"logits differ from PyTorch: max abs error {self.max_abs_error:.1e} > {self.bound:.1e}")
        least, found = self._bounds.effect_correlation, self.effect_correlation
        if least is not None and found is not None and not found >= least:
            failures.append(f"the customers' effect is not PyTorch's: correlation {found:.4f} < {least}")
        least, found = self._bounds.label_agreement, self.label_agreement
        if least is not None and not found >= least:
            failures.append(f"{self._answers} are not PyTorch's: agreement {found:.4f} < {least}")
        return failures


@dataclass(frozen=True)
class ForcedReport(ParityReport):
    """Of a decoder: `bound` is a share of the logits' standard deviation, and labels are the likeliest tokens.

    Attributes:
        alone: the first token that a row of a mixed batch wrote otherwise than alone; empty where there is none.
        alone_tokens: of each row's answer that were compared.
    """

    alone: str = ""
    alone_tokens: int = 0

    _answers: ClassVar[str] = "the likeliest tokens"

    @property
    def _bounds(self) -> Bounds:
        return DECODER_BOUNDS[self.precision]

    def _failures(self) -> list[str]:
        return super()._failures() + ([self.alone] if self.alone else [])


def compare_effects(found: np.ndarray, expected: np.ndarray) -> tuple[float | None, float | None]:
    """Cosine of two effects, and their largest difference by the largest effect; none where nothing is expected.

    Args:
        found: `logits(c) - logits(0)` of a graph, flat.
        expected: PyTorch's.
    """
    largest = np.abs(expected).max(initial=0)
    if not largest > 0:
        return None, None
    if not np.isfinite(found).all():
        return 0.0, float("inf")
    product = np.linalg.norm(found) * np.linalg.norm(expected)
    # A graph without any effect has no direction either.
    cosine = float(np.clip(found @ expected / product, -1, 1)) if product > 0 else 0.0
    return cosine, float(np.abs(found - expected).max() / largest)
