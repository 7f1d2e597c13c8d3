"""Whether a customer belongs to a switchable bundle."""

from qrlora_deploy.errors import BasisMismatchError, MismatchError, argument
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.bundle.bundle import Manifest
from qrlora_deploy.tasks.registry import task_named


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
        raise MismatchError(
            f"{place} is a {coefficients.task}, the bundle a {manifest.task}{_remedy(coefficients.task, manifest)}"
        )
    if coefficients.values.shape != (manifest.total_rank,):
        raise MismatchError(f"{place}: expected {manifest.total_rank} coefficients, not {len(coefficients.values)}")


def _remedy(wanted: str, manifest: Manifest) -> str:
    """What to do where the same output can be of either task, as one number is a regression's and a reranker's."""
    tasks = (task_named(wanted), task_named(manifest.task))
    alike = all(task.has_labels for task in tasks) and any(task.fits_head(None, manifest.width) for task in tasks)
    return f"; export the bundle with {argument('task', tasks[0].option)}" if alike else ""
