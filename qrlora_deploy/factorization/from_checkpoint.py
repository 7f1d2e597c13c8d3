"""From a checkpoint to a basis."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from qrlora_deploy.factorization.weighting import Moments, weighted
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
    moments: Moments | None = None,
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
        moments: of each layer's inputs, by which columns are weighted (`weighting.weighted`); None: all alike.

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
    weights = _Weights(checkpoint, moments)
    names, ranks = _planned(weights, names, rule, device, progress)
    for name, q, r, diagonal in _results(weights, names, ranks, device):
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


@dataclass(frozen=True)
class _Weights:
    """The weights of a base, and what their columns are weighted by."""

    checkpoint: Checkpoint
    moments: Moments | None

    def read(self, name: str, device: str) -> torch.Tensor:
        """The weight `[out, in]` as it is stored."""
        return read_weight(self.checkpoint, name).to(device)

    def factorized(self, name: str, device: str) -> torch.Tensor:
        """What is factorized in its place, `[out, in]`."""
        weight = self.read(name, device)
        if self.moments is None:
            return weight
        with _naming(name):
            return weighted(weight, self.moments[name])

    def exact(self, name: str) -> np.ndarray:
        """`factorized` in fp64 on the host."""
        return self.factorized(name, "cpu").to(torch.float64).numpy()

    def stacked(self, names: list[str]) -> torch.Tensor:
        """`factorized` of several, on the GPU."""
        return torch.stack([self.factorized(name, "cuda") for name in names])

    def mapped(self, name: str, q: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        """The R `[rank, in]` of the weight itself, from Q and the R of what was factorized."""
        if self.moments is None:
            return r
        return q.mT.to(torch.float64) @ self.read(name, q.device.type).to(torch.float64)


def _planned(
    weights: _Weights, names: list[str], rule: RankRule, device: str, progress: Progress | None
) -> tuple[list[str], Ranks]:
    """The targets of which the rule keeps something, and what says how much of each."""
    if rule.per_target:
        return names, partial(chosen_ranks, rule)
    # A pass for the diagonals alone: the factors of all targets in full would be larger than the base.
    chosen = chosen_ranks(rule, _diagonals(weights, names, device, progress))
    return [name for name in names if chosen[name]], partial(_picked, chosen)


def _results(weights: _Weights, names: list[str], ranks: Ranks, device: str) -> Iterator[Factors]:
    """The factors of each target as soon as they are there, so that no more than a batch of them is whole at a time."""
    for batch, place in _batches(weights.checkpoint, names, device):
        yield from (_by_lapack if place == "cpu" else _by_batch)(weights, batch, ranks)


def _picked(chosen: dict[str, int], diagonals: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: chosen[name] for name in diagonals}


def _diagonals(weights: _Weights, names: list[str], device: str, progress: Progress | None) -> dict[str, np.ndarray]:
    """The whole diagonal of R of every target, in the order of `names`."""
    found: dict[str, np.ndarray] = {}
    for batch, place in _batches(weights.checkpoint, names, device):
        if place == "cpu":
            found |= {name: _diagonal(weights, name) for name in batch}
        else:
            stacked = weights.stacked(batch)
            with _naming(", ".join(batch[:2])):
                found |= zip(batch, diagonals_of(stacked), strict=True)
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


def _diagonal(weights: _Weights, name: str) -> np.ndarray:
    weight = weights.exact(name)
    with _naming(name):
        return diagonal_of(weight)


def _by_lapack(weights: _Weights, names: list[str], ranks: Ranks) -> Iterator[Factors]:
    for name in names:
        weight = weights.exact(name)
        with _naming(name):
            result = factorize_weight(weight)
        rank = ranks({name: result.diagonal})[name]
        q, r = result.q[:, :rank], result.r[:rank]
        yield name, q, weights.mapped(name, torch.from_numpy(q), torch.from_numpy(r)).numpy(), result.diagonal


def _by_batch(weights: _Weights, names: list[str], ranks: Ranks) -> Iterator[Factors]:
    def named(diagonals: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, diagonals, strict=True))

    stacked = weights.stacked(names)
    with _naming(", ".join(names[:2])):
        found = pivoted_qr(stacked, keep=lambda each: max(ranks(named(each)).values()))
    diagonals = named(found.diagonal.cpu().numpy())
    for index, (name, rank) in enumerate(ranks(diagonals).items()):
        q = found.q[index, :, :rank]
        r = weights.mapped(name, q, found.r[index, :rank])
        # In fp32 as the basis stores them: half the way from the device.
        yield name, q.float().cpu().numpy(), r.float().cpu().numpy(), diagonals[name]


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
