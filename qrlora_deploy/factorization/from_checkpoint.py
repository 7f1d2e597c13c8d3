"""From a checkpoint to a basis."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from qrlora_deploy.errors import InputError, ProviderError, QrloraError, argument
from qrlora_deploy.factorization.decomposition import (
    bytes_of_one,
    diagonal_of,
    diagonals_of,
    factorize_weight,
    pivoted_qr,
)
from qrlora_deploy.formats.basis import Basis, BasisTarget
from qrlora_deploy.io.arrays import on_disk
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.targets import is_conv1d
from qrlora_deploy.rank_rules.base import RankRule
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.rank_rules.registry import check_rule, chosen_ranks
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
    scratch: Path | None = None,
) -> Basis:
    """Factorize the weights of the layers `names`.

    Args:
        checkpoint: the base.
        names: module paths, from `choose_targets`.
        rule: by which the ranks are chosen.
        device: "cpu" (LAPACK) or "cuda".
        progress: called with (description, done, total) after each weight; a rule that sees all targets at once has
            each weight counted twice, once for its diagonal.
        scratch: a folder where factors lie instead of in memory, for a basis that may be larger; it is the caller's to
            remove when the basis is written.

    Raises:
        InputError: the base is none of the supported kind or is not whole, a layer is missing, or its weight is
            not a finite floating-point matrix.
        ProviderError: CUDA was asked for where there is none.
        QrloraError: `scratch` is full.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ProviderError(
            f"{argument('device', 'cuda')} was asked for, but PyTorch finds no CUDA device; "
            f"use {argument('device', 'cpu')}"
        )
    if device not in ("cpu", "cuda"):
        raise InputError(f"{argument('device')} must be cpu or cuda, not {device}")
    check_rule(rule)
    checkpoint.check_base()
    _check_rank(checkpoint, names, rule)
    done: dict[str, BasisTarget] = {}
    names, ranks = _planned(checkpoint, names, rule, device, progress)
    for name, q, r, diagonal in _results(checkpoint, names, ranks, device):
        digest = checkpoint.tensor_digest(checkpoint.tensor_of(name))
        kept_q, kept_r = _placed([_stored(q), _stored(r)], scratch, len(done))
        done[name] = BasisTarget(name, kept_q, kept_r, _stored(diagonal), digest)
        if progress:
            progress("factorize", len(done), len(names))
    versions = {"qrlora-deploy": __version__} | {name: version(name) for name in ("torch", "scipy", "numpy")}
    return Basis(tuple(done[name] for name in names), checkpoint.name, rule, versions | {"device": device})


def _check_rank(checkpoint: Checkpoint, names: list[str], rule: RankRule) -> None:
    """Refuse, by an InputError, a rank that no layer has."""
    if not isinstance(rule, FixedRank):
        return
    most = max(min(checkpoint.skeleton().get_parameter(f"{name}.weight").shape) for name in names)
    if rule.rank > most:
        raise InputError(
            f"{argument('rank', rule.rank)} is more than the chosen layers allow; "
            f"give {most} at most, or {argument('tau')}"
        )


Factors = tuple[str, np.ndarray, np.ndarray, np.ndarray]
"""Name, `Q [out, rank]`, `R [rank, in]` and the whole diagonal `[min(out, in)]` of a target."""

Ranks = Callable[[dict[str, np.ndarray]], dict[str, int]]
"""From the diagonals of some targets to their ranks, in the same order."""


def _stored(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)


def _placed(arrays: list[np.ndarray], scratch: Path | None, number: int) -> list[np.ndarray]:
    """The same, in files where there is a folder for them."""
    if scratch is None:
        return arrays
    try:
        return [on_disk(array, scratch / f"{number}.{part}") for part, array in enumerate(arrays)]
    except OSError as error:
        raise QrloraError(f"cannot write in {scratch}: {error.strerror or error}") from error


def _planned(
    checkpoint: Checkpoint, names: list[str], rule: RankRule, device: str, progress: Progress | None
) -> tuple[list[str], Ranks]:
    """The targets of which the rule keeps something, and what says how much of each."""
    if rule.per_target:
        return names, partial(chosen_ranks, rule)
    # A pass for the diagonals alone: the factors of all targets in full would be larger than the base.
    chosen = chosen_ranks(rule, _diagonals(checkpoint, names, device, progress))
    return [name for name in names if chosen[name]], partial(_picked, chosen)


def _results(checkpoint: Checkpoint, names: list[str], ranks: Ranks, device: str) -> Iterator[Factors]:
    """The factors of each target as soon as they are there, so that no more than a batch of them is whole at a time."""
    for batch, place in _batches(checkpoint, names, device):
        yield from (_by_lapack if place == "cpu" else _by_batch)(checkpoint, batch, ranks)


def _picked(chosen: dict[str, int], diagonals: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: chosen[name] for name in diagonals}


def _diagonals(
    checkpoint: Checkpoint, names: list[str], device: str, progress: Progress | None
) -> dict[str, np.ndarray]:
    """The whole diagonal of R of every target, in the order of `names`."""
    found: dict[str, np.ndarray] = {}
    for batch, place in _batches(checkpoint, names, device):
        if place == "cpu":
            found |= {name: _diagonal(checkpoint, name) for name in batch}
        else:
            weights = _stacked(checkpoint, batch)
            with _naming(", ".join(batch[:2])):
                found |= zip(batch, diagonals_of(weights), strict=True)
        if progress:
            progress("diagonals", len(found), len(names))
    return {name: found[name] for name in names}


def _batches(checkpoint: Checkpoint, names: list[str], device: str) -> Iterator[tuple[list[str], str]]:
    """Targets that are factorized together, and where: "cpu" or "cuda"."""
    if device == "cpu":
        yield from (([name], "cpu") for name in names)
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
            yield from (([name], "cpu") for name in group)
            continue
        yield from ((group[start : start + size], device) for start in range(0, len(group), size))


def _diagonal(checkpoint: Checkpoint, name: str) -> np.ndarray:
    with _naming(name):
        return diagonal_of(_exact(checkpoint, name))


def _by_lapack(checkpoint: Checkpoint, names: list[str], ranks: Ranks) -> Iterator[Factors]:
    for name in names:
        with _naming(name):
            result = factorize_weight(_exact(checkpoint, name))
        rank = ranks({name: result.diagonal})[name]
        yield name, result.q[:, :rank], result.r[:rank], result.diagonal


def _by_batch(checkpoint: Checkpoint, names: list[str], ranks: Ranks) -> Iterator[Factors]:
    def named(diagonals: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, diagonals, strict=True))

    weights = _stacked(checkpoint, names)
    with _naming(", ".join(names[:2])):
        found = pivoted_qr(weights, keep=lambda each: max(ranks(named(each)).values()))
    # In fp32 as the basis stores them: half the way from the device.
    q, r = found.q.float().cpu().numpy(), found.r.float().cpu().numpy()
    diagonals = named(found.diagonal.cpu().numpy())
    for index, (name, rank) in enumerate(ranks(diagonals).items()):
        yield name, q[index, :, :rank], r[index, :rank], diagonals[name]


def _exact(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return read_weight(checkpoint, name).to(torch.float64).numpy()


def _stacked(checkpoint: Checkpoint, names: list[str]) -> torch.Tensor:
    return torch.stack([read_weight(checkpoint, name).to("cuda") for name in names])


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
