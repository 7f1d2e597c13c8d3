"""Whether a customer belongs to a switchable bundle."""

from qrlora_deploy.errors import BasisMismatchError, MismatchError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.bundle.bundle import Manifest


def check_customer_fits(coefficients: Coefficients, manifest: Manifest, place: str) -> None:
    """Make sure that a customer was trained for what the bundle holds; its head and labels are not looked at.

    Args:
        place: the customer's name or file, for the message.

    Raises:
        BasisMismatchError: it was trained on another basis or base.
        InputError: it has another task, or another number of coefficients.
    """
    if coefficients.basis_digest != manifest.basis_digest:
        raise BasisMismatchError(
            f"{place} was trained on basis {coefficients.basis_digest[:12]}, but the bundle holds "
            f"{manifest.basis_digest[:12]}; train it on that basis, or export another bundle"
        )
    if coefficients.base_digest != manifest.base_digest:
        raise BasisMismatchError(
            f"{place} was trained on base {coefficients.base_digest[:12]}, but the bundle holds "
            f"{manifest.base_digest[:12]}"
        )
    if coefficients.task != manifest.task:
        raise MismatchError(f"{place} is a {coefficients.task}, the bundle a {manifest.task}")
    if coefficients.values.shape != (manifest.total_rank,):
        raise MismatchError(f"{place}: expected {manifest.total_rank} coefficients, not {len(coefficients.values)}")
