"""A whole report of `bench` from a GPU: merged and switchable, fp16 and fp32, captured graphs or not, and peers.

    python -m benchmarks.gpu_report -o results/bench

Writes report.json and report.html for fp16 beside PyTorch and PEFT, for fp32, and for a switchable
bundle whose rows are all one customer's. The model has RoBERTa-base's shape and random weights.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.common.serving import prepare
from qrlora_deploy.bench.page import render_page
from qrlora_deploy.bench.report import Report, write_report
from qrlora_deploy.bench.run import run_benchmark
from qrlora_deploy.bench.settings import BenchSettings
from qrlora_deploy.formats.coefficients import write_coefficients
from qrlora_deploy.rank_rules.fixed_rank import FixedRank

RANK = 160
PRECISIONS = {"fp16": "fp16", "fp16_one_customer": "fp16", "fp32": "fp32"}
"""Of the bundles of each report."""


def make_plans(folder: Path, arguments: argparse.Namespace) -> dict[str, BenchSettings]:
    """Export what the reports need and say what is to be measured, by name of the report."""
    customers = folder / "customers"
    customers.mkdir()
    rule = FixedRank(arguments.rank)
    made = {}
    for precision in sorted({PRECISIONS[name] for name in arguments.reports}):
        place = folder / precision
        place.mkdir()
        made[precision] = prepare(place, arguments.model, max(arguments.batch), rule, arguments.provider, precision)
        for kind in ("merged", "switchable"):
            (place / kind).rename(folder / f"{kind}-{precision}")
    for name, customer in next(iter(made.values())).customers.items():
        write_coefficients(customer, customers / f"{name}.safetensors")
    graphs = "both" if arguments.provider == "cuda" else "off"
    fp16 = BenchSettings(
        (folder / "merged-fp16", folder / "switchable-fp16"),
        customers=customers,
        scenarios=("single-stream", "offline", "server", "swap"),
        batches=tuple(arguments.batch),
        lengths=tuple(arguments.length),
        provider=arguments.provider,
        cuda_graph=graphs,  # type: ignore[arg-type]
        peers=tuple(arguments.peer),
        base=folder / next(iter(made)) / "base",
        seconds=arguments.seconds,
    )
    short = replace(fp16, scenarios=("single-stream",), peers=())
    graph = "on" if arguments.provider == "cuda" else "off"
    plans = {
        "fp16": fp16,
        "fp16_one_customer": replace(short, mix="one", cuda_graph=graph),  # type: ignore[arg-type]
        "fp32": replace(short, bundles=(folder / "merged-fp32", folder / "switchable-fp32")),
    }
    return {name: plan for name, plan in plans.items() if name in arguments.reports}


def show(name: str, report: Report) -> None:
    """Print medians and ratios."""
    for item in report.of("single-stream"):
        found = {key: round(value.value, 3) for key, value in item.percentiles.items()}
        print(f"{name:18} {item.subject:30} {item.shape:8} {found} stable {item.stable}", flush=True)
    for other in report.comparisons:
        if other.statistic == "p50" and other.scenario == "single-stream":
            ratio = other.ratio
            shape = f"{other.batch}x{other.length}"
            print(f"{name:18} {other.subject:30} {shape:8} {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
    for found_capacity in report.capacities:
        print(f"{name:18} {found_capacity.subject:30} {found_capacity.rate_per_s} requests/s", flush=True)


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--model", choices=["tiny", "minilm", "roberta-base"], default="roberta-base")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--length", type=int, nargs="+", default=[128])
    parser.add_argument("--peer", nargs="*", default=["torch-eager", "torch-compile"])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--reports", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("-o", "--output", type=Path, required=True, help="beginning of the files' names")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, plan in make_plans(Path(folder), arguments).items():
            report = run_benchmark(plan)
            write_report(report, arguments.output.with_name(f"{arguments.output.name}_{name}.json"))
            page = arguments.output.with_name(f"{arguments.output.name}_{name}.html")
            page.write_text(render_page(report), encoding="utf-8")
            show(name, report)


if __name__ == "__main__":
    main()
