"""The coefficients that come closest to an update, and how much of it they hold.

The columns of `Q` are orthonormal, so the matrices `q_i r_i` of one target are orthogonal to each other, and the least
squares of `|ΔW - Q diag(c) R|` fall apart into one quotient a coefficient: `c_i = (q_i' ΔW) r_i / |r_i|²`.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qrlora_deploy.formats.basis import BasisTarget


class Update(Protocol):
    """A change `ΔW [out, in]` of one weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""

    def along(self, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        """`q_i' ΔW r_i` for the columns of `q [out, rank]` and the rows of `r [rank, in]`: `[rank]` fp64."""

    def energy(self) -> float:
        """The squared Frobenius norm of `ΔW`."""


@dataclass(frozen=True)
class DenseUpdate:
    """A change that is known as a whole.

    Attributes:
        delta: `[out, in]` fp64.
    """

    delta: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """As `Update.shape`."""
        return (self.delta.shape[0], self.delta.shape[1])

    def along(self, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        """As `Update.along`."""
        found: np.ndarray = np.einsum("ri,ri->r", q.T @ self.delta, r)
        return found

    def energy(self) -> float:
        """As `Update.energy`."""
        return float(np.square(self.delta).sum())


@dataclass(frozen=True)
class LowRankUpdate:
    """A change `scale * B A`, of which the product is never made.

    Attributes:
        b: `[out, rank]` fp64.
        a: `[rank, in]` fp64.
        scale: of the product.
    """

    b: np.ndarray
    a: np.ndarray
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """As `Update.shape`."""
        return (self.b.shape[0], self.a.shape[1])

    def along(self, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        """As `Update.along`."""
        found: np.ndarray = self.scale * np.einsum("rk,rk->r", q.T @ self.b, r @ self.a.T)
        return found

    def energy(self) -> float:
        """As `Update.energy`."""
        # Rounding may leave a hair below zero, and NaN must stay NaN.
        return float(np.maximum(self.scale**2 * np.sum((self.b.T @ self.b) * (self.a @ self.a.T)), 0.0))


@dataclass(frozen=True)
class Held:
    """An update as a target's coefficients.

    Attributes:
        values: `[rank]` fp64.
        energy: squared norm of the update.
        held: squared norm of `Q diag(c) R`, that of the update less what is left of it.
    """

    values: np.ndarray
    energy: float
    held: float


def hold(target: BasisTarget, update: Update) -> Held:
    """The coefficients of `target` that come closest to `update`, in fp64.

    A direction that is zero in the base, which no coefficient can move, gets 0.
    """
    q, r = target.q.astype(np.float64), target.r.astype(np.float64)
    along, lengths = update.along(q, r), np.square(r).sum(axis=1)
    values = np.divide(along, lengths, out=np.zeros_like(along), where=lengths > 0)
    return Held(values, update.energy(), float((values * along).sum()))


def transfer(old: BasisTarget, new: BasisTarget) -> np.ndarray:
    """`[new rank, old rank]` fp64: this times `c` are the coefficients of `new` closest to `Q diag(c) R` of `old`.

    `c'_i = Σ_j (q'_i q_j) (r_j r'_i) c_j / |r'_i|²`, of the same weight's place in two bases.
    """
    q, r = old.q.astype(np.float64), old.r.astype(np.float64)
    new_q, new_r = new.q.astype(np.float64), new.r.astype(np.float64)
    lengths = np.square(new_r).sum(axis=1, keepdims=True)
    product = (new_q.T @ q) * (new_r @ r.T)
    return np.divide(product, lengths, out=np.zeros_like(product), where=lengths > 0)
