"""Customers of one basis as customers of another one."""

from dataclasses import replace

import numpy as np

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.basis_fit import check_basis_fits
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.projection.least_squares import Held, transfer
from qrlora_deploy.projection.projecting import Projection, Tally

REBASED = "rebased"
"""Entry of a customer's training record: what it was made of."""


class Rebasing:
    """Turns customers of one basis into customers of another, by least squares of `Q diag(c) R`.

    All that the two bases have to do with each other is computed once; a customer then takes a product a target.

    Args:
        old: the basis that customers were trained on.
        new: the basis that they go to.
        base: the base of `new`, where it is another one than that of `old`; updates are put on its weights as they are.

    Raises:
        InputError: the bases have no target in common, or other shapes; or the base is another one and was not given.
        BasisMismatchError: `new` was made from other weights than `base`.
    """

    def __init__(self, old: Basis, new: Basis, base: Checkpoint | None = None) -> None:
        self.old, self.new, self.base = old, new, base
        theirs = {target.name: target for target in new.targets}
        common = [target for target in old.targets if target.name in theirs]
        if not common:
            raise InputError("the two bases have no target in common; nothing of a customer would be left")
        if base is not None:
            check_basis_fits(base, new)
        changed = [one.name for one in common if one.weight_digest != theirs[one.name].weight_digest]
        if base is None and changed:
            raise InputError(
                f"the new basis was made from other weights, {changed[0]} for one; give its base by {argument('base')}"
            )
        for target in common:
            other = theirs[target.name]
            shapes = [(one.q.shape[0], one.r.shape[1]) for one in (target, other)]
            if shapes[0] != shapes[1]:
                raise InputError(
                    f"{target.name} is {list(shapes[0])} in the old basis and {list(shapes[1])} in the new one"
                )
        self._transfers = {target.name: transfer(target, theirs[target.name]) for target in common}
        self._lengths = {basis.digest: _lengths(basis) for basis in (old, new)}

    def customer(self, customer: Coefficients) -> Projection:
        """A customer on the new basis.

        Raises:
            BasisMismatchError: it was trained on another basis than the old one.
            InputError: it answers by the base's head, and the new base has other labels; or its own does not fit there.
        """
        customer.check_fits(self.old)
        self._check_head(customer)
        tally = Tally(self.new)
        before, after = self._lengths[self.old.digest], self._lengths[self.new.digest]
        for name, part in self.old.split(customer.values).items():
            c = part.astype(np.float64)
            energy = float(np.square(c) @ before[name])
            if name not in self._transfers:
                tally.lost[name] = energy
                continue
            values = self._transfers[name] @ c
            tally.held[name] = Held(values, energy, float(np.square(values) @ after[name]))
        moved = replace(customer, basis_digest=self.new.digest, basis_file=str(self.new.file) if self.new.file else "")
        if self.base is not None:
            moved = replace(moved, base_name=self.base.name, base_digest=self.base.digest)
        made = tally.projection(moved)
        origin = {"digest": customer.digest, "basis": self.old.digest, "share": made.share}
        return replace(made, customer=replace(made.customer, training=customer.training | {REBASED: origin}))

    def _check_head(self, customer: Coefficients) -> None:
        if self.base is None:
            return
        if not customer.head and self.base.labels != customer.labels:
            raise InputError(
                f"it answers by the head of its base, and {self.base.name} has other labels; such customers need data"
            )
        for name, values in customer.head.items():
            stored = self.base.stored.get(name)
            if stored is None or tuple(stored.shape[1:]) != values.shape[1:]:
                raise InputError(f"its own head has {name} {list(values.shape)}, which does not fit {self.base.name}")


def _lengths(basis: Basis) -> dict[str, np.ndarray]:
    """`|r_i|²` of each target, `[rank]` fp64; a coefficient's energy is its square times this."""
    return {target.name: np.square(target.r.astype(np.float64)).sum(axis=1) for target in basis.targets}
