"""The arithmetic of a merge, and the checks that base, basis and customer belong together.

Sums are formed in fp64 and rounded once to the stored type.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qrlora_deploy.errors import BasisMismatchError, InputError, QrloraError
from qrlora_deploy.factorization.decomposition import update
from qrlora_deploy.formats.basis import Basis, BasisTarget
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.formats.provenance import FILE_NAME
from qrlora_deploy.models.adapter import resolve_layer
from qrlora_deploy.models.basis_fit import check_basis_fits
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.targets import is_conv1d

STORED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types a sum may be rounded to; anything else is a quantised weight."""


@dataclass(frozen=True)
class Fold:
    """The update of one stored tensor, in its stored orientation."""

    target: BasisTarget
    c: np.ndarray
    transposed: bool

    def delta(self) -> torch.Tensor:
        exact = _delta(self.target, self.c)
        return exact.T if self.transposed else exact

    def merged(self, stored: torch.Tensor) -> torch.Tensor:
        weight = stored.T if self.transposed else stored
        merged = merged_weight(weight, self.target, self.c)
        return (merged.T if self.transposed else merged).contiguous()


def merged_weight(weight: torch.Tensor, target: BasisTarget, c: np.ndarray) -> torch.Tensor:
    """`W + Q diag(c) R` in fp64, rounded once to the dtype of `weight [out, in]`.

    Raises:
        InputError: the weight is quantised or has another shape than the basis.
        QrloraError: the sum does not fit the dtype (fp16 ends at 65504).
    """
    if weight.dtype not in STORED_DTYPES:
        raise InputError(f"{target.name} is stored as {weight.dtype}: merging needs fp32, fp16 or bf16 weights")
    expected = (target.q.shape[0], target.r.shape[1])
    if tuple(weight.shape) != expected:
        raise BasisMismatchError(f"{target.name} has shape {list(weight.shape)}, the basis has {list(expected)}")
    merged = round_once(weight.double() + _delta(target, c).to(weight.device), weight.dtype)
    if not bool(merged.isfinite().all()):
        raise QrloraError(f"{target.name}: the merged weight does not fit {weight.dtype}; merge into an fp32 base")
    return merged


def _delta(target: BasisTarget, c: np.ndarray) -> torch.Tensor:
    """ΔW `[out, in]` in fp64."""
    return torch.from_numpy(update(target.q.astype(np.float64), c.astype(np.float64), target.r.astype(np.float64)))


def round_once(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round fp64 to `dtype`, to nearest even.

    PyTorch converts fp64 to 16 bits by way of fp32, which rounds twice. Rounding to odd on the way
    (Boldo and Melquiond 2008) leaves enough in the last bit for the second step to be the right one.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return exact.to(dtype)
    nearest = exact.to(torch.float32)
    back = nearest.double()
    # The bits of a float are sign and magnitude, so subtracting 1 steps towards zero for both signs.
    bits = nearest.view(torch.int32) - (back.abs() > exact.abs()).int()
    return (bits | (back != exact).int()).view(torch.float32).to(dtype)


def half_step(values: torch.Tensor) -> torch.Tensor:
    """Half the distance to the next number of the dtype, in fp64: what one rounding may cost."""
    limits = torch.finfo(values.dtype)
    # frexp gives a mantissa in [0.5, 1), so the step is eps * 2^(exponent - 1); below the smallest
    # normal number it stays that of the smallest.
    exponent = torch.frexp(values.double().abs().clamp_min(limits.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(values, limits.eps, dtype=torch.float64), exponent - 2)


def digest_of(stored: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, as `Checkpoint.tensor_digest` of the file it is written to."""
    return hashlib.sha256(stored.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def plan_folds(checkpoint: Checkpoint, basis: Basis, coefficients: Coefficients, model: Any) -> dict[str, Fold]:
    """The updates by tensor name, after every check that can be made before a weight is changed.

    Args:
        model: loaded from `checkpoint`, or its skeleton.

    Raises:
        InputError: the base is quantised, incomplete or merged already, or no classifier, or a target is
            missing or shares its weight with another layer.
        BasisMismatchError: base, basis and coefficients do not belong together.
    """
    if (checkpoint.folder / FILE_NAME).is_file():
        raise InputError(f"{checkpoint.name} is merged already; merge into its base, or unmerge it first")
    checkpoint.require_task_head(coefficients.task)
    coefficients.check_fits(basis)
    _check_not_shared(checkpoint, basis, model)
    check_basis_fits(checkpoint, basis)
    if coefficients.base_digest != checkpoint.digest:
        raise BasisMismatchError(
            f"the coefficients were trained on base {coefficients.base_digest[:12]}, but {checkpoint.name} is "
            f"{checkpoint.digest[:12]}; the targets agree, another tensor (a head?) differs"
        )
    return folds_of(checkpoint, basis, coefficients.values, model)


def folds_of(checkpoint: Checkpoint, basis: Basis, values: np.ndarray, model: Any) -> dict[str, Fold]:
    """The updates of `values [total_rank]` by tensor name of `checkpoint`."""
    parts = basis.split(values)
    return {
        checkpoint.tensor_of(target.name): Fold(
            target, parts[target.name], is_conv1d(resolve_layer(model, target.name)[1])
        )
        for target in basis.targets
    }


def _check_not_shared(checkpoint: Checkpoint, basis: Basis, model: Any) -> None:
    """Refuse targets whose weight is also used elsewhere: the update would reach that layer too."""
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    shared = []
    for target in basis.targets:
        path, layer = resolve_layer(model, target.name)
        others = [name for name in users[id(layer.weight)] if name != path]
        if others:
            shared.append(f"{target.name} (with {', '.join(others)})")
    if shared:
        raise InputError(
            f"{checkpoint.name}: tied weights cannot be merged: {'; '.join(shared)}; untie them, or leave them out"
        )


def check_head(checkpoint: Checkpoint, coefficients: Coefficients) -> int:
    """Number of logits after the merge.

    Raises:
        InputError: the customer's head or labels do not fit the checkpoint; all problems are listed.
    """
    problems = []
    outputs = {len(values) for values in coefficients.head.values()} or {len(checkpoint.labels)}
    for name, values in coefficients.head.items():
        if name not in checkpoint.tensor_files:
            problems.append(f"it has no tensor {name}")
        elif tuple(checkpoint.read(name).shape[1:]) != values.shape[1:]:
            problems.append(f"{name} is {list(checkpoint.read(name).shape)}, the customer's {list(values.shape)}")
    if len(outputs) != 1:
        problems.append(f"the head's tensors have different numbers of rows: {sorted(outputs)}")
    elif coefficients.labels and len(coefficients.labels) not in outputs:
        problems.append(f"{len(coefficients.labels)} labels, but {outputs.pop()} outputs")
    if problems:
        raise InputError(f"the customer does not fit {checkpoint.name}: {'; '.join(problems)}")
    return outputs.pop()
