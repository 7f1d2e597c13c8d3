"""How long a serving process takes to have all its customers: one packed file against files of their own.

    python benchmarks/cold_start.py --customers 1000000 --json benchmarks/results/cold_start_cpu.json

The reader, the checks and the table are those of the product, the table on the host; only the ONNX
graph is left out, which takes no part. Every stage runs in a process of its own, one at a time.
Needs about 2.6 kB of disk and 3 kB of memory per customer.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np

from qrlora_deploy.bench.environment import describe_environment, host_memory_bytes
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.io.files import write_json
from qrlora_deploy.runtime.bundle.bundle import Manifest, TargetRecord
from qrlora_deploy.runtime.bundle.row_layout import TABLE, TableLayout, padded_rank
from qrlora_deploy.runtime.customers.packed import load_packed
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from qrlora_deploy.runtime.customers.store import CustomerStore
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.runtime.sessions.versions import Versions
from qrlora_deploy.runtime.table.memory import make_memory
from qrlora_deploy.runtime.table.table import CoefficientTable
from qrlora_deploy.tasks.answering import Answering

TARGETS = 4
REPEATS = 5
FEW_LABELS = 2
DISTINCT = 1024
"""Vectors that take turns: making a million of them is not what is measured."""


def make_labels(count: int) -> tuple[str, ...]:
    """Names of as many labels."""
    return tuple(f"category-{index:03d}" for index in range(count))


def make_session(coefficients: int, labels: int = FEW_LABELS) -> SwitchableSession:
    """A session with its table but without a graph."""
    ranks = [len(part) for part in np.array_split(np.arange(coefficients), TARGETS)]
    targets = tuple(
        TargetRecord(name=f"layer{index}", rank=rank, padded_rank=padded_rank(rank)) for index, rank in enumerate(ranks)
    )
    session = SwitchableSession.__new__(SwitchableSession)
    session.manifest = Manifest.model_construct(
        kind="switchable",
        task="text-classification",
        labels=make_labels(labels),
        basis_digest="b" * 64,
        base_digest="a" * 64,
        total_rank=coefficients,
        targets=targets,
        inputs=(),
    )
    session.layout, session.head, session.base_head, session.fetch = TableLayout(ranks), None, None, None
    session.versions = Versions(Answering(session.manifest.labels))
    widths = {TABLE: session.layout.width}
    session.table = CoefficientTable(lambda rows: make_memory(widths, rows, "cpu"))
    return session


def make_customers(count: int, coefficients: int, labels: int = FEW_LABELS) -> Iterator[tuple[str, Coefficients]]:
    """Customers with ids of 16 characters."""
    values = np.random.default_rng(0).normal(size=(DISTINCT, coefficients)).astype(np.float32)
    names = make_labels(labels)
    for index in range(count):
        yield (
            f"customer-{index:07d}",
            Coefficients(values[index % DISTINCT], "b" * 64, "base", "a" * 64, "text-classification", names),
        )


def pack(path: Path, count: int, coefficients: int) -> dict[str, Any]:
    """Write the packed file."""
    start = time.perf_counter()
    write_packed(make_customers(count, coefficients), path, make_session(coefficients).manifest)
    return {"seconds": round(time.perf_counter() - start, 2), "size_bytes": path.stat().st_size}


def load(path: Path, coefficients: int, cold: bool) -> dict[str, Any]:
    """Load the packed file into an empty table; `cold`: none of it is in the system's memory."""
    _settle([path], cold)
    session = make_session(coefficients)
    before_bytes = host_memory_bytes(peak=True)
    start = time.perf_counter()
    count = load_packed(session, path)
    elapsed_s = time.perf_counter() - start
    return {
        "customers": count,
        "seconds": round(elapsed_s, 3),
        "gigabytes_per_second": round(path.stat().st_size / elapsed_s / 1e9, 3),
        "peak_rss_bytes": host_memory_bytes(peak=True),
        "rss_before_bytes": before_bytes,
        "table_bytes": 4 * session.table.memory.rows * session.layout.width,
    }


def write_files(folder: Path, count: int, coefficients: int, labels: int) -> dict[str, Any]:
    """Write customers as files of their own."""
    start = time.perf_counter()
    for name, customer in make_customers(count, coefficients, labels):
        write_coefficients(customer, folder / f"{name}.safetensors")
    return {"seconds": round(time.perf_counter() - start, 2)}


def fetch_files(folder: Path, coefficients: int, labels: int, cold: bool) -> dict[str, Any]:
    """Fetch every customer of a folder through a store, one after the other."""
    _settle(sorted(folder.iterdir()), cold)
    session = make_session(coefficients, labels)
    store = CustomerStore(session, folder)
    start, cpu = time.perf_counter(), time.process_time()
    names = store.customers()
    for name in names:
        store.fetch(name)
    elapsed_s = time.perf_counter() - start
    return {
        "customers": len(names),
        "seconds": round(elapsed_s, 3),
        "microseconds_each": round(1e6 * elapsed_s / len(names), 1),
        "cpu_microseconds_each": round(1e6 * (time.process_time() - cpu) / len(names), 1),
        "peak_rss_bytes": host_memory_bytes(peak=True),
    }


def _settle(paths: list[Path], cold: bool) -> None:
    """Finish all writing, and put the files into the system's memory or out of it."""
    os.sync()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(2**24):
                    pass


def alone(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """Run in a fresh process and print the result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result = pool.submit(function, *arguments).result()
    click.echo(f"{function.__name__:12} {result}", err=True)
    return result


def repeated(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """The run that took the median time, and the times of all."""
    results = sorted((alone(function, *arguments) for _ in range(REPEATS)), key=lambda result: result["seconds"])
    return results[REPEATS // 2] | {"seconds_of_all": [result["seconds"] for result in results]}


@click.command(help=__doc__)
@click.option("--customers", type=click.IntRange(min=1), default=1_000_000, show_default=True)
@click.option("--coefficients", type=click.IntRange(min=TARGETS), default=640, show_default=True)
@click.option("--files", type=click.IntRange(min=1), default=10_000, show_default=True, help="Files of their own.")
@click.option("--labels", type=click.IntRange(min=1), default=FEW_LABELS, show_default=True, help="In each of these.")
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where to work.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="JSON file to write.")
def main(customers: int, coefficients: int, files: int, labels: int, folder: Path | None, output: Path | None) -> None:
    """Measure all stages, and write the record where asked."""
    if not host_memory_bytes(peak=True):
        raise click.ClickException("this benchmark needs Linux")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        packed, single = Path(place) / "packed.safetensors", Path(place) / "single"
        single.mkdir()
        record: dict[str, Any] = {
            "customers": customers,
            "coefficients": coefficients,
            "labels": labels,
            "pack": alone(pack, packed, customers, coefficients),
            "load_packed": repeated(load, packed, coefficients, False),
            "load_packed_cold": repeated(load, packed, coefficients, True),
        }
        packed.unlink()
        record["write_files"] = alone(write_files, single, files, coefficients, labels)
        record["fetch_files"] = repeated(fetch_files, single, coefficients, labels, False)
        record["fetch_files_cold"] = repeated(fetch_files, single, coefficients, labels, True)
    for name in ("fetch_files", "fetch_files_cold"):
        record[f"{name}_extrapolated_seconds"] = round(customers * record[name]["seconds"] / files, 1)
    record["environment"] = describe_environment().model_dump(mode="json")
    if output:
        write_json(output, record)


if __name__ == "__main__":
    main()
