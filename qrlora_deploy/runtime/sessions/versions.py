"""What goes with a customer's numbers in the table: how they become answers, and which version they are."""

from dataclasses import dataclass

import numpy as np

from qrlora_deploy.formats.coefficients import Coefficients, content_digest
from qrlora_deploy.tasks.answering import Answering

SHARED_ANSWERINGS = 4096
"""Different labels of customers that are remembered, so that those who have the same ones share them."""


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a customer, as far as it is no row of numbers.

    Attributes:
        answering: how its logits become an answer.
        digest: `Coefficients.digest`; empty for the base, and for a customer of a packed file until it is asked for:
            the file keeps one for all of them, and making millions would take longer than loading them.
    """

    answering: Answering
    digest: str = ""

    def with_digest(self, values: np.ndarray) -> "Version":
        """The same of a customer without a head of its own, with the digest of its `values [total_rank]` fp32."""
        return Version(self.answering, content_digest(values, {}, self.answering.thresholds))


class Versions:
    """Makes the versions of customers; those who decide alike share what says so.

    Args:
        answering: of the base.

    Attributes:
        base: the version of the base, and of everybody of whom the table notes nothing.
    """

    def __init__(self, answering: Answering) -> None:
        self.base = Version(answering)
        self._shared: dict[Answering, Version] = {}

    def of(self, coefficients: Coefficients) -> Version:
        """The version of a customer."""
        own, base = coefficients, self.base.answering
        if own.labels == base.labels and own.thresholds == base.thresholds:
            # Most customers: a swap comes through here.
            return Version(base, own.digest)
        shared = self.without_digest(Answering(coefficients.labels, coefficients.thresholds)) or self.base
        return Version(shared.answering, coefficients.digest)

    def without_digest(self, answering: Answering) -> Version | None:
        """What the table notes of a customer whose digest is not known; None where it decides as the base."""
        if answering == self.base.answering:
            return None
        if len(self._shared) >= SHARED_ANSWERINGS:
            self._shared = {}
        return self._shared.setdefault(answering, Version(answering))
