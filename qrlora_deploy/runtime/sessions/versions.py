"""What goes with a customer's numbers in the table: how they become answers, and which version they are."""

from dataclasses import dataclass

from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.tasks.answering import Answering

SHARED_ANSWERINGS = 4096
"""Different labels of customers that are remembered, so that those who have the same ones share them."""


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a customer, as far as it is no row of numbers.

    Attributes:
        answering: how its logits become an answer.
        digest: `Coefficients.digest`; empty for the base, and for customers of a packed file, which keeps one
            digest for all of them.
    """

    answering: Answering
    digest: str = ""


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
        shared = self.without_digest(Answering(coefficients.labels, coefficients.thresholds)) or self.base
        return Version(shared.answering, coefficients.digest)

    def without_digest(self, answering: Answering) -> Version | None:
        """What the table notes of a customer whose digest is not known; None where it decides as the base."""
        if answering == self.base.answering:
            return None
        if len(self._shared) >= SHARED_ANSWERINGS:
            self._shared = {}
        return self._shared.setdefault(answering, Version(answering))
