"""What an operator does on a serving host, without PyTorch and transformers; and files that say odd things."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients, write_coefficients
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from tests.cli.running import Ran, environment, run_here, succeed_here

BLOCKED = """
import sys
for name in ("torch", "transformers", "datasets", "sklearn", "scipy", "onnx"):
    sys.modules[name] = None  # any import of it fails
from qrlora_deploy.cli import main
main()
"""


@pytest.fixture
def place(tmp_path: Path, tiny_customer: Coefficients, tiny_basis_file: Path, switchable: Path) -> Path:
    """A serving host: a bundle, customers in files and in one file, their basis."""
    (tmp_path / "bundle").symlink_to(switchable)
    shutil.copy(tiny_basis_file, tmp_path / "basis.safetensors")
    write_coefficients(replace(tiny_customer, basis_file="basis.safetensors"), tmp_path / "acme.safetensors")
    write_packed([("acme", tiny_customer)], tmp_path / "packed.safetensors", open_bundle(switchable).manifest)
    return tmp_path


def run_without(line: str, cwd: Path) -> Ran:
    """Run a command where neither PyTorch nor transformers can be imported."""
    (cwd / "blocked.py").write_text(BLOCKED)
    done = subprocess.run(
        [sys.executable, "blocked.py", *line.split()],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(),
        timeout=240,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("acme.safetensors", "coefficients"),
        ("basis.safetensors", "basis"),
        ("bundle", "bundle"),
        ("packed.safetensors", "packed customers"),
    ],
)
def test_inspect_needs_no_pytorch(place: Path, name: str, kind: str) -> None:
    found = run_without(f"inspect {name} --json", place)
    assert found.code == 0 and found.json["kind"] == kind, found.err
    assert found.json == run_here("inspect", name, "--json", cwd=place).json


def test_combine_needs_no_pytorch(place: Path, tiny_customer: Coefficients) -> None:
    ran = run_without("combine acme.safetensors:0.5 -o half.safetensors", place)
    assert ran.code == 0, ran.err
    combined = read_coefficients(place / "half.safetensors")
    np.testing.assert_array_equal(combined.values, tiny_customer.values * np.float32(0.5))
    assert combined.basis_file == "basis.safetensors"


def test_a_packed_file_is_described_and_its_damage_named(place: Path, tiny_customer: Coefficients) -> None:
    found = succeed_here(["inspect", "packed.safetensors"], place)
    assert (found["customers"], found["coefficients"]) == (1, len(tiny_customer.values))
    assert found["basis_digest"] == tiny_customer.basis_digest and found["labels"] == list(tiny_customer.labels)
    content = bytearray((place / "packed.safetensors").read_bytes())
    content[-9] ^= 1
    (place / "packed.safetensors").write_bytes(content)
    refused = run_here("inspect", "packed.safetensors", cwd=place)
    assert refused.code == 2 and "packed.safetensors was changed after it was written" in refused.err


@pytest.mark.parametrize("name", ["x" * 5_000, "a/" * 3_000 + "b", "\0", "/" + "y" * 300, "../" * 2_000])
def test_a_basis_whose_name_no_system_takes_is_not_found(place: Path, tiny_customer: Coefficients, name: str) -> None:
    write_coefficients(replace(tiny_customer, basis_file=name, base_name=name), place / "odd.safetensors")
    found = succeed_here(["inspect", "odd.safetensors"], place)
    # A place on this disk is recorded as seen from the file.
    assert found["basis_found"] is False and (found["basis_file"] == name or name.startswith("/"))
    merged = run_here("merge", "--coefficients", "odd.safetensors", "-o", "new", cwd=place)
    assert merged.code == 2 and "give it with --basis" in merged.err and len(merged.err) < 500
    combined = succeed_here(["combine", "odd.safetensors", "-o", "again.safetensors"], place)
    assert combined["output"] == "again.safetensors"
    base = ["merge", "--coefficients", "odd.safetensors", "--basis", "basis.safetensors", "-o", "new"]
    refused = run_here(*base, cwd=place)
    assert refused.code == 2 and "internal" not in refused.err and len(refused.err.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("bundle/manifest.json", "inspect bundle"),
        ("bundle/config.json", "predict bundle --text a"),
        ("acme.safetensors", "inspect acme.safetensors"),
        ("basis.safetensors", "inspect basis.safetensors"),
        ("packed.safetensors", "inspect packed.safetensors"),
        ("gate.toml", "bench bundle --gate gate.toml"),
        ("base/config.json", "inspect base"),
    ],
)
def test_a_file_that_may_not_be_read_is_bad_input(place: Path, tiny_base: Path, path: str, line: str) -> None:
    _unlink_to_copy(place / "bundle")
    shutil.copytree(tiny_base, place / "base")
    (place / "gate.toml").write_text("[parity]\nmax_abs_error = 1\n")
    (place / path).chmod(0)
    refused = run_here(*line.split(), cwd=place)
    assert refused.code == 2 and "Permission denied" in refused.err and path in refused.err, refused.err


def _unlink_to_copy(link: Path) -> None:
    target = link.resolve()
    link.unlink()
    shutil.copytree(target, link)


def refuse_to_read(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the system refuse to open files of this name, as it does to everybody but root."""
    opened = Path.open

    def open_path(self: Path, *arguments: Any, **named: Any) -> Any:
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", open_path)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("manifest.json", "inspect bundle"),
        ("manifest.json", "predict bundle --text a"),
        ("packed.safetensors", "inspect packed.safetensors"),
        ("gate.toml", "bench bundle --gate gate.toml"),
        ("report.json", "bench bundle --reference report.json"),
        ("config.json", "inspect base"),
    ],
)
def test_a_file_that_the_system_refuses_is_bad_input(
    place: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: str
) -> None:
    (place / "base").symlink_to(tiny_base)
    for file in ("gate.toml", "report.json"):
        (place / file).touch()
    refuse_to_read(monkeypatch, name)
    refused = run_here(*line.split(), cwd=place)
    assert refused.code == 2 and f"{name} cannot be read: Permission denied" in refused.err, refused.err


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "size of text": ({"vocab_size": "x"}, "vocab_size: Input should be a valid integer"),
    "size true": ({"hidden_size": True}, "hidden_size: Input should be a valid integer"),
    "architecture of a number": ({"architectures": 5}, "architectures: Input should be a valid list"),
    "architecture null": ({"architectures": [None]}, "architectures.0: Input should be a valid string"),
    "labels of a number": ({"id2label": 3}, "id2label: Input should be a valid dictionary"),
    "labels from 1": ({"id2label": {"1": "a", "2": "b"}}, "id2label must count from 0 on, and has no 0"),
    "a label of a list": ({"id2label": {"0": []}}, "id2label.0"),
    "deep": ({"id2label": {"0": [[]] * 9}}, "id2label.0"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_other_types_is_one_line(tiny_base: Path, tmp_path: Path, name: str) -> None:
    change, message = CONFIGS[name]
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    refused = run_here("inspect", "base", cwd=tmp_path)
    assert refused.code == 2 and "base/config.json" in refused.err and message in refused.err, refused.err
    assert len(refused.err.splitlines()) == 1
