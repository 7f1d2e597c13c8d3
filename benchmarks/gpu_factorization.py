"""Pivoted QR on a GPU: against LAPACK's pivots first, then timed beside svd, unpivoted QR and LAPACK.

    python -m benchmarks.gpu_factorization -o FILE

Weights are random, with three spectra: Gaussian; one that falls over three decades, as trained weights do; and a
condition of 1e10. "project" is what `factorize` does with the query and value projections of a model of 32 layers
and 4096 columns: fp16 weights on the device, tau 0.5, factors back on the host in fp32. Rounds are interleaved;
svd and LAPACK take seconds, so they run in the first `--slow-runs` rounds only.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch

from benchmarks.common.measuring import environment
from qrlora_deploy.factorization.decomposition import BatchFactorization, pivoted_qr
from qrlora_deploy.io.files import write_json
from qrlora_deploy.rank_rules.energy_share import EnergyShare

TIE = 1e-7
"""Relative distance of residual norms that counts as a tie: LAPACK, too, downdates its norms to half their digits."""

PIVOTS_OF_LARGE = 1
"""Matrices of the large case whose pivots are compared: LAPACK takes seconds for each."""


def gaussian(batch: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """`[batch, n, n]` fp64."""
    return torch.randn(batch, n, n, dtype=torch.float64, device=generator.device, generator=generator)


def falling(batch: int, n: int, generator: torch.Generator, decades: float) -> torch.Tensor:
    """Columns and rows mixed at random, scales over `decades` powers of ten between."""
    scales = torch.logspace(0, -decades, n, dtype=torch.float64, device=generator.device)
    return (gaussian(batch, n, generator) * scales) @ gaussian(batch, n, generator) / n**0.5


def conditioned(batch: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """Singular values from 1 to 1e-10."""
    left, right = (torch.linalg.qr(gaussian(batch, n, generator))[0] for _ in range(2))
    return (left * torch.logspace(0, -10, n, dtype=torch.float64, device=generator.device)) @ right


SPECTRA: dict[str, Callable[[int, int, torch.Generator], torch.Tensor]] = {
    "gaussian": gaussian,
    "three decades": lambda batch, n, generator: falling(batch, n, generator, 3.0),
    "condition 1e10": conditioned,
}


def check(weights: torch.Tensor, found: BatchFactorization, count: int) -> dict[str, float | int]:
    """Errors of the factors, and the pivots of the first `count` matrices against LAPACK's in fp64.

    Raises:
        SystemExit: an error is over its bound, or pivots differ where there is no tie.
    """
    eye = torch.eye(found.q.shape[2], dtype=torch.float64, device=weights.device)
    errors = {
        "orthonormality": float((found.q.mT @ found.q - eye).abs().max()),
        "reconstruction": float((found.q @ found.r - weights).abs().max() / weights.abs().max()),
    }
    energies, ties = 0.0, 0
    for row in range(count):
        r, pivots = scipy.linalg.qr(weights[row].cpu().numpy(), mode="r", pivoting=True, check_finite=False)
        ours = found.diagonal[row].cpu().numpy()
        energies = max(energies, float(np.abs(_shares(ours) - _shares(np.diag(r))).max()))
        ties += _tied(weights[row], found.pivots[row].cpu().numpy(), pivots)
    errors["energies"] = energies
    print(f"  checked {count} of {len(weights)} with LAPACK: {errors}, {ties} parted at a tie", flush=True)
    if not (errors["orthonormality"] <= 1e-12 and errors["reconstruction"] <= 1e-12 and energies <= 1e-10):
        raise SystemExit(f"an error is over its bound: {errors}")
    return errors | {"compared_with_lapack": count, "parted_at_a_tie": ties}


def _shares(diagonal: np.ndarray) -> np.ndarray:
    energies = np.square(diagonal)
    shares: np.ndarray = np.cumsum(energies) / energies.sum()
    return shares


def _tied(weight: torch.Tensor, ours: np.ndarray, theirs: np.ndarray) -> int:
    """0 where the pivots are the same, 1 where they part at a tie: behind it they need not agree."""
    different = np.flatnonzero(ours != theirs)
    if not len(different):
        return 0
    step = int(different[0])
    q = torch.linalg.qr(weight[:, torch.from_numpy(ours[:step]).to(weight.device)])[0]
    two = weight[:, [int(ours[step]), int(theirs[step])]]
    norms = (two - q @ (q.mT @ two)).norm(dim=0).tolist()
    # Rounding of the whole factorization, in units of the largest column.
    noise = 10 * float(np.finfo(np.float64).eps) * len(ours) * float(weight.norm(dim=0).max())
    if abs(norms[0] - norms[1]) > TIE * max(norms) + noise:
        raise SystemExit(f"pivots differ from LAPACK's at step {step} without a tie: residuals {norms}")
    return 1


def measure_case(weights: torch.Tensor, rounds: int, slow_runs: int) -> dict[str, Any]:
    """Milliseconds of each way for the whole batch; LAPACK's are those of one matrix times the batch."""
    one = weights[0].cpu().numpy()
    ways: dict[str, Callable[[], Any]] = {
        "pivoted_qr": lambda: pivoted_qr(weights),
        "torch.linalg.qr": lambda: torch.linalg.qr(weights),
        "torch.linalg.svd": lambda: torch.linalg.svd(weights),
        "geqp3": lambda: scipy.linalg.qr(one, mode="economic", pivoting=True, check_finite=False),
    }
    slow = ("torch.linalg.svd", "geqp3")
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for name in ("pivoted_qr", "torch.linalg.qr"):
        ways[name]()  # kernels are compiled and libraries loaded
    torch.linalg.svd(weights[:1, :64, :64])
    for turn in range(rounds):
        for name, way in ways.items():
            if name in slow and turn >= slow_runs:
                continue
            samples[name].append(_milliseconds(way, weights.device) * (len(weights) if name == "geqp3" else 1))
    medians = {name: float(np.median(values)) for name, values in samples.items()}
    ratios = {name: medians[name] / medians["pivoted_qr"] for name in ways if name != "pivoted_qr"}
    for name, median in medians.items():
        print(f"  {name:18} {median:10.2f} ms  {ratios.get(name, 1.0):7.2f}x  ({len(samples[name])} runs)", flush=True)
    return {"median_ms": medians, "times_ours": ratios, "samples_ms": samples}


def _milliseconds(way: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    way()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_project(count: int, n: int, generator: torch.Generator, runs: int) -> dict[str, Any]:
    """`count` matrices `[n, n]` in fp16 to factors at tau 0.5 on the host, in seconds."""
    weights = torch.cat([falling(1, n, generator, 3.0).half() for _ in range(count)])
    rule, seconds, ranks = EnergyShare(0.5), [], 0

    def widest(diagonals: np.ndarray) -> int:
        return max(rule.choose({str(index): row for index, row in enumerate(diagonals)}).values())

    def factorize() -> None:
        nonlocal ranks
        found = pivoted_qr(weights, keep=widest)
        ranks = found.q.shape[2]
        for part in (found.q, found.r, found.diagonal):
            part.float().cpu()

    for turn in range(runs + 1):
        taken = _milliseconds(factorize, weights.device) / 1e3
        seconds += [taken] if turn else []
    print(f"  {count} x {n}: {np.median(seconds):.3f} s, largest rank {ranks}", flush=True)
    peak = torch.cuda.max_memory_allocated() if weights.is_cuda else 0
    return {
        "matrices": count,
        "columns": n,
        "median_s": float(np.median(seconds)),
        "samples_s": seconds,
        "largest_rank": ranks,
        "peak_bytes": peak,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check and time every case; returns the record that is written."""
    generator = torch.Generator(arguments.device).manual_seed(0)
    record: dict[str, Any] = {"environment": environment(arguments.device), "cores": os.cpu_count(), "cases": {}}
    for batch, n in arguments.case:
        for name, spectrum in SPECTRA.items():
            print(f"{batch} x {n}, {name}", flush=True)
            weights = spectrum(batch, n, generator)
            compared = batch if n < 2048 else PIVOTS_OF_LARGE
            found = check(weights, pivoted_qr(weights), compared)
            slow_runs = arguments.slow_runs if name == "gaussian" else 0
            rounds = arguments.rounds if slow_runs else 2
            timed = measure_case(weights, rounds, slow_runs) if slow_runs else _ours_only(weights, rounds)
            record["cases"][f"{batch}x{n} {name}"] = {"errors": found} | timed
    count, n = arguments.project
    record["project"] = measure_project(count, n, generator, arguments.rounds)
    return record


def _ours_only(weights: torch.Tensor, rounds: int) -> dict[str, Any]:
    samples = [_milliseconds(lambda: pivoted_qr(weights), weights.device) for _ in range(rounds)]
    print(f"  pivoted_qr         {np.median(samples):10.2f} ms", flush=True)
    return {"median_ms": {"pivoted_qr": float(np.median(samples))}, "samples_ms": {"pivoted_qr": samples}}


def _shape(text: str) -> tuple[int, int]:
    batch, _, n = text.partition("x")
    return int(batch), int(n)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--case", type=_shape, nargs="+", default=[(24, 768), (8, 4096)], help="matrices x columns")
    parser.add_argument("--project", type=_shape, default=(64, 4096), help="matrices x columns, at tau 0.5")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-runs", type=int, default=1, help="runs of svd and LAPACK")


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("-o", "--output", type=Path)
    add_arguments(parser)
    arguments = parser.parse_args()
    record = measure(arguments)
    if arguments.output:
        write_json(arguments.output, record)


if __name__ == "__main__":
    main()
