"""One short benchmark of the tiny bundles, for all tests that look at what it gave."""

from dataclasses import replace
from pathlib import Path

import pytest

from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.report_parts import SCENARIOS
from qrlora_deploy.bench.run import run_benchmark
from qrlora_deploy.bench.settings import BenchSettings
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from tests.tiny import LABELS, SENTENCES


@pytest.fixture(scope="session")
def customers(tiny_customer: Coefficients, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two customers that can be served, and one that was trained on another basis."""
    folder = tmp_path_factory.mktemp("customers")
    write_coefficients(tiny_customer, folder / "acme.safetensors")
    write_coefficients(replace(tiny_customer, values=-tiny_customer.values), folder / "bolt.safetensors")
    write_coefficients(replace(tiny_customer, basis_digest="e" * 64), folder / "stranger.safetensors")
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled file for each of two customers."""
    folder = tmp_path_factory.mktemp("labelled")
    for name in ("acme", "bolt"):
        rows = [f"{text}\t{LABELS[index % len(LABELS)]}" for index, text in enumerate(SENTENCES)]
        (folder / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    return folder


@pytest.fixture(scope="session")
def settings(exported: Path, switchable: Path, customers: Path, labelled: Path) -> BenchSettings:
    """Every scenario, as short as it can be."""
    return BenchSettings(
        (exported, switchable),
        customers=customers,
        labelled=labelled,
        scenarios=SCENARIOS,
        batches=(1, 2),
        lengths=(8,),
        threads=1,
        seconds=1.0,
        samples=40,
        server_runs=2,
        idle_seconds=0.01,
        repeats=2,
    )


@pytest.fixture(scope="session")
def measured(settings: BenchSettings) -> Report:
    """What the settings gave."""
    return run_benchmark(settings)
