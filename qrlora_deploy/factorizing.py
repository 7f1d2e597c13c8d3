"""From a checkpoint to a basis."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

import numpy as np
import torch

from qrlora_deploy import __version__
from qrlora_deploy.basis import Basis, BasisTarget
from qrlora_deploy.checkpoint import Checkpoint
from qrlora_deploy.errors import InputError, ProviderError
from qrlora_deploy.factorization import Factorization, factorize_weight, factorize_weights
from qrlora_deploy.rank_rule import RankRule
from qrlora_deploy.targets import is_conv1d

Progress = Callable[[str, int, int], None]

BATCH_BYTES = 2 * 2**30
"""Bound on the fp64 weights and Gram matrices of one batch on the GPU."""


def factorize(
    checkpoint: Checkpoint,
    names: list[str],
    rule: RankRule,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Basis:
    """Factorize the weights of the layers `names`.

    Args:
        checkpoint: the base.
        names: module paths, from `choose_targets`.
        rule: how many directions are kept.
        device: "cpu" (LAPACK) or "cuda".
        progress: called with (description, done, total) after each weight.

    Raises:
        InputError: a layer is missing, or its weight is not a finite floating-point matrix.
        ProviderError: CUDA was asked for where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ProviderError("--device cuda was asked for, but PyTorch finds no CUDA device; use --device cpu")
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, not {device}")
    done: dict[str, BasisTarget] = {}
    for name, result in _results(checkpoint, names, device):
        rank = rule.ranks_of(result.diagonal)
        done[name] = BasisTarget(
            name,
            np.ascontiguousarray(result.q[:, :rank], dtype=np.float32),
            np.ascontiguousarray(result.r[:rank], dtype=np.float32),
            result.diagonal.astype(np.float32),
            checkpoint.tensor_digest(checkpoint.tensor_of(name)),
        )
        if progress:
            progress("factorize", len(done), len(names))
    versions = {"qrlora-deploy": __version__} | {name: version(name) for name in ("torch", "scipy", "numpy")}
    return Basis(tuple(done[name] for name in names), checkpoint.name, rule, versions | {"device": device})


def _results(checkpoint: Checkpoint, names: list[str], device: str) -> Iterator[tuple[str, Factorization]]:
    if device == "cpu":
        for name in names:
            with _naming(name):
                result = factorize_weight(read_weight(checkpoint, name).to(torch.float64).numpy())
            yield name, result
        return
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name in names:
        out, width = checkpoint.skeleton().get_parameter(f"{name}.weight").shape
        by_shape.setdefault((out, width), []).append(name)
    for (out, width), group in by_shape.items():
        size = max(1, BATCH_BYTES // (8 * (3 * out * width + 2 * max(out, width) ** 2)))
        for start in range(0, len(group), size):
            batch = group[start : start + size]
            weights = torch.stack([read_weight(checkpoint, name).to(device) for name in batch])
            with _naming(", ".join(batch[:2])):
                results = factorize_weights(weights)
            yield from zip(batch, results, strict=True)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the layer's name in front of an error about its weight."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def read_weight(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """The stored weight of a layer as `[out, in]`, whatever the layer's own orientation.

    Raises:
        InputError: it is not a floating-point matrix (a quantised base).
    """
    weight = checkpoint.read(checkpoint.tensor_of(name))
    if not weight.is_floating_point() or weight.element_size() < 2 or weight.ndim != 2:
        raise InputError(f"{name} is stored as {weight.dtype} {list(weight.shape)}; an unquantised matrix is needed")
    return weight.T if is_conv1d(checkpoint.skeleton().get_submodule(name)) else weight
