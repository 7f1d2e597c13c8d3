"""Whether a basis was made from a base."""

from typing import TYPE_CHECKING

from qrlora_deploy.errors import BasisMismatchError
from qrlora_deploy.formats.basis import Basis

if TYPE_CHECKING:
    from qrlora_deploy.models.checkpoint import Checkpoint


def check_basis_fits(checkpoint: "Checkpoint", basis: Basis) -> None:
    """Make sure that a basis was made from the weights of this checkpoint.

    Raises:
        BasisMismatchError: some weights differ; all of them are counted, the first ones named.
        InputError: the checkpoint has no such layer, or is not usable as it is.
    """
    checkpoint.check_usable()
    wrong = [
        target.name
        for target in basis.targets
        if checkpoint.tensor_digest(checkpoint.tensor_of(target.name)) != target.weight_digest
    ]
    if wrong:
        raise BasisMismatchError(
            f"the basis was made from other weights than {checkpoint.name}: {len(wrong)} of "
            f"{len(basis.targets)} targets differ ({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''})"
        )
