"""A mistake in this project's own code is never called a damaged file: it stays an internal error."""

import json
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from qrlora_deploy.bench.report import write_report
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from tests.bench.fixed import good_report
from tests.cli.running import run_here
from tests.tiny import LABELS, SENTENCES

READERS = {
    "inspect acme.safetensors": (
        "io.files.read_record",
        "io.sealing.content_digest",
        "io.sealing.digest_arrays",
        "formats.coefficients._allows",
        "formats.coefficients._check",
        "formats.coefficients.from_value",
        "inspection.describe._kind",
        "models.locating._places",
    ),
    "inspect basis.safetensors": ("formats.basis._target", "formats.basis.read_rule", "formats.basis.digest_arrays"),
    "inspect packed.safetensors": (
        "runtime.customers.packed_header._sizes",
        "runtime.customers.packed_header.PackedHeader._json",
        "runtime.customers.packed_tail.PackedTail.ids",
        "runtime.customers.packed_check.digest_piece",
    ),
    "inspect bundle": (
        "runtime.bundle.manifest_checks.TableLayout",
        "runtime.bundle.bundle._check",
        "runtime.bundle.manifest_checks.read_config_facts",
        "runtime.bundle.external_data._walk",
        "runtime.bundle.sealed_facts.label_names",
        "runtime.bundle.sealed_facts._read_reference",
    ),
    "verify bundle": ("runtime.verification.reference._case", "runtime.bundle.manifest_checks._config_problems"),
    "inspect base": ("inspection.describe.label_names", "formats.config_file.parse_json"),
    "predict bundle --requests requests.jsonl": ("runtime.prediction.requests.parse_line",),
    "bench bundle --gate gate.toml": ("bench.gate_file.from_value", "bench.gate_file.read_text"),
    "bench bundle --reference report.json": ("io.versions.Versions.check", "bench.report.from_json"),
    "combine acme.safetensors -o new.safetensors": (
        "merging.combining._check_alike",
        "merging.combining._weighted_sum",
    ),
    "pack customers --bundle bundle -o new.safetensors": (
        "runtime.customers.packed_writer.check_customer_fits",
        "formats.customer_files.read_coefficients_content",
    ),
    "export base --basis basis.safetensors -o new": (
        "exporting.registry.find_exporter",
        "exporting.choosing.choose_options",
    ),
    "factorize base -o new.safetensors --target query": (
        "models.targets._fits",
        "factorization.from_checkpoint._results",
    ),
    "merge --coefficients acme.safetensors -o new": ("models.locating._base_names", "formats.provenance.parse_json"),
    "train base --basis basis.safetensors --data good.tsv -o new.safetensors": (
        "data.examples._texts",
        "data.labels.settled",
    ),
    "doctor": ("inspection.doctor.examine",),
}
"""What is run, and which functions of the project then fail, each by itself."""


@pytest.fixture(scope="module")
def place(
    tiny_base: Path,
    tiny_basis_file: Path,
    tiny_customer: Coefficients,
    switchable: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with one of everything that is read, all of it right."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "base").symlink_to(tiny_base)
    (folder / "bundle").symlink_to(switchable)
    shutil.copy(tiny_basis_file, folder / "basis.safetensors")
    (folder / "customers").mkdir()
    for path in (folder / "acme.safetensors", folder / "customers" / "acme.safetensors"):
        write_coefficients(tiny_customer, path)
    write_packed([("acme", tiny_customer)], folder / "packed.safetensors", open_bundle(switchable).manifest)
    write_report(good_report(), folder / "report.json")
    (folder / "gate.toml").write_text("[parity]\nmax_abs_error = 0.001\n")
    (folder / "requests.jsonl").write_text(json.dumps({"text": "play music"}))
    rows = [f"{sentence}\t{LABELS[index % 4]}" for index, sentence in enumerate(SENTENCES)]
    (folder / "good.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", "utf-8")
    return folder


@pytest.mark.parametrize(("command", "function"), [(line, name) for line, names in READERS.items() for name in names])
def test_a_mistake_of_ours_stays_an_internal_error(
    place: Path, monkeypatch: pytest.MonkeyPatch, command: str, function: str
) -> None:
    for kind in (KeyError, TypeError, AttributeError):

        def fail(*_arguments: object, kind: type[Exception] = kind, **_named: object) -> NoReturn:
            raise kind("planted")

        monkeypatch.setattr(f"qrlora_deploy.{function}", fail)
        shown = run_here(*command.split(), cwd=place)
        line = shown.err.splitlines()[-1]
        assert line.startswith(f"Error: internal error ({kind.__name__}: ") and "planted" in line, shown.err
        assert shown.code == 1 and not list(place.glob("*new*"))
