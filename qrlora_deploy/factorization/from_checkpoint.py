"""From a checkpoint to a basis."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

import numpy as np
import torch

from qrlora_deploy.errors import InputError, ProviderError
from qrlora_deploy.factorization.decomposition import bytes_of_one, factorize_weight, pivoted_qr
from qrlora_deploy.formats.basis import Basis, BasisTarget
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.targets import is_conv1d
from qrlora_deploy.rank_rules.rule import RankRule
from qrlora_deploy.version import __version__

Progress = Callable[[str, int, int], None]

MEMORY_SHARE = 0.8
"""Of a GPU's free memory that a batch may take: the libraries' workspaces need some, too."""


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
        InputError: the base is none of the supported kind or is not whole, a layer is missing, or its weight is
            not a finite floating-point matrix.
        ProviderError: CUDA was asked for where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ProviderError("--device cuda was asked for, but PyTorch finds no CUDA device; use --device cpu")
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, not {device}")
    checkpoint.check_base()
    _check_rank(checkpoint, names, rule)
    done: dict[str, BasisTarget] = {}
    for name, q, r, diagonal in _results(checkpoint, names, rule, device):
        digest = checkpoint.tensor_digest(checkpoint.tensor_of(name))
        done[name] = BasisTarget(name, _stored(q), _stored(r), _stored(diagonal), digest)
        if progress:
            progress("factorize", len(done), len(names))
    versions = {"qrlora-deploy": __version__} | {name: version(name) for name in ("torch", "scipy", "numpy")}
    return Basis(tuple(done[name] for name in names), checkpoint.name, rule, versions | {"device": device})


def _check_rank(checkpoint: Checkpoint, names: list[str], rule: RankRule) -> None:
    """Refuse, by an InputError, a rank that no layer has."""
    if rule.rank is None:
        return
    most = max(min(checkpoint.skeleton().get_parameter(f"{name}.weight").shape) for name in names)
    if rule.rank > most:
        raise InputError(f"--rank {rule.rank} is more than the chosen layers allow; give {most} at most, or --tau")


Factors = tuple[str, np.ndarray, np.ndarray, np.ndarray]
"""Name, `Q [out, rank]`, `R [rank, in]` and the whole diagonal `[min(out, in)]` of a target."""


def _stored(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)


def _results(checkpoint: Checkpoint, names: list[str], rule: RankRule, device: str) -> Iterator[Factors]:
    if device == "cpu":
        yield from _by_lapack(checkpoint, names, rule)
        return
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name in names:
        out, width = checkpoint.skeleton().get_parameter(f"{name}.weight").shape
        by_shape.setdefault((out, width), []).append(name)
    for (out, width), group in by_shape.items():
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        size = int(MEMORY_SHARE * free / max(bytes_of_one(out, width), bytes_of_one(width, out)))
        if size == 0:
            # One matrix alone is larger than the device's memory, not than the host's.
            yield from _by_lapack(checkpoint, group, rule)
            continue
        for start in range(0, len(group), size):
            yield from _by_batch(checkpoint, group[start : start + size], rule, device)


def _by_lapack(checkpoint: Checkpoint, names: list[str], rule: RankRule) -> Iterator[Factors]:
    for name in names:
        with _naming(name):
            result = factorize_weight(read_weight(checkpoint, name).to(torch.float64).numpy())
        rank = rule.ranks_of(result.diagonal)
        yield name, result.q[:, :rank], result.r[:rank], result.diagonal


def _by_batch(checkpoint: Checkpoint, names: list[str], rule: RankRule, device: str) -> Iterator[Factors]:
    weights = torch.stack([read_weight(checkpoint, name).to(device) for name in names])
    with _naming(", ".join(names[:2])):
        found = pivoted_qr(weights, keep=rule.ranks_of)
    # In fp32 as the basis stores them: half the way from the device.
    q, r = found.q.float().cpu().numpy(), found.r.float().cpu().numpy()
    for index, (name, diagonal) in enumerate(zip(names, found.diagonal.cpu().numpy(), strict=True)):
        rank = rule.ranks_of(diagonal)
        yield name, q[index, :, :rank], r[index, :rank], diagonal


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
