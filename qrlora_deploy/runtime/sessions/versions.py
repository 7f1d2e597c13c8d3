"""What goes with a customer's numbers in the table: the names of its outputs, and which version it is."""

from dataclasses import dataclass

from qrlora_deploy.formats.coefficients import Coefficients

SHARED_LABELS = 4096
"""Different labels of customers that are remembered, so that those who have the same ones share them."""


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a customer, as far as it is no row of numbers.

    Attributes:
        labels: names of the outputs.
        digest: `Coefficients.digest`; empty for the base, and for customers of a packed file, which keeps one
            digest for all of them.
    """

    labels: tuple[str, ...]
    digest: str = ""


class Versions:
    """Makes the versions of customers.

    Args:
        labels: of the base.

    Attributes:
        base: the version of the base, and of what is not known by its digest.
    """

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.base = Version(labels)
        self._shared: dict[tuple[str, ...], tuple[str, ...]] = {}

    def of(self, coefficients: Coefficients) -> Version:
        """The version of a customer; its labels are shared with others that have the same ones."""
        if coefficients.labels == self.base.labels:
            return Version(self.base.labels, coefficients.digest)
        if len(self._shared) >= SHARED_LABELS:
            self._shared = {}
        return Version(self._shared.setdefault(coefficients.labels, coefficients.labels), coefficients.digest)
