"""Whether a basis was made from a base."""

from typing import Protocol

from qrlora_deploy.errors import BasisMismatchError
from qrlora_deploy.formats.basis import Basis


class Weights(Protocol):
    """What is asked of a checkpoint: `Checkpoint` has it."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def check_usable(self) -> None:
        """Make sure that its files are whole."""

    def tensor_of(self, module_path: str) -> str:
        """The tensor of a target's weight."""

    def tensor_digest(self, tensor: str) -> str:
        """Of a tensor as it is stored."""


def check_basis_fits(checkpoint: Weights, basis: Basis) -> None:
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
