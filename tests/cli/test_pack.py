"""`pack` on the command line: what is written, and what is refused in one line."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.customers.packed import load_packed
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from tests.cli.running import run, run_here, succeed, succeed_here

PACK = "pack customers --bundle bundle -o packed.safetensors"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switchable: Path, tiny_customer: Coefficients) -> Path:
    """The current folder: a bundle and two customers."""
    (tmp_path / "bundle").symlink_to(switchable)
    (tmp_path / "customers").mkdir()
    for name in ("acme", "bolt"):
        write_coefficients(tiny_customer, tmp_path / "customers" / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.makes
def test_the_file_is_in_the_dtype_of_the_bundles_table_unless_it_is_said(
    place: Path, tiny_base: Path, tiny_basis_file: Path, tiny_customer: Coefficients
) -> None:
    command = f"export {tiny_base} --basis {tiny_basis_file} --table-dtype fp16 -o half"
    exported = succeed_here(command.split(), place)
    assert {record["name"]: record["dtype"] for record in exported["inputs"]}["coefficient_table"] == "float16"
    session = SwitchableSession(open_bundle(place / "half"), threads=1)
    sizes = {}
    for option, dtype in (("", "fp16"), (" --dtype fp16", "fp16"), (" --dtype fp32", "fp32")):
        made = succeed_here(f"pack customers --bundle half -o packed.safetensors{option}".split(), place)
        assert made["dtype"] == dtype
        sizes[dtype] = made["size_bytes"]
        assert load_packed(session, place / "packed.safetensors") == 2
        held, _ = session.table.hold(["bolt"])
        row = session.table.memory.parts["coefficient_table"].read_rows(held["bolt"], 1)[0]
        session.table.release(held.values())
        np.testing.assert_array_equal(row, session.layout.row(tiny_customer.values))
    assert sizes["fp32"] - sizes["fp16"] == 2 * 2 * len(tiny_customer.values)


def test_pack(place: Path, tiny_customer: Coefficients) -> None:
    (place / "customers" / "note.txt").write_text("not a customer")
    made = succeed(PACK.split(), place)
    file = place / "packed.safetensors"
    manifest = open_bundle(place / "bundle").manifest
    assert made == {
        "output": "packed.safetensors",
        "dtype": "fp32",
        "size_bytes": file.stat().st_size,
        "customers": 2,
        "coefficients": len(tiny_customer.values),
        "basis_digest": manifest.basis_digest,
        "base_digest": manifest.base_digest,
    }
    session = SwitchableSession(open_bundle(place / "bundle"), threads=1)
    assert load_packed(session, file) == 2 and sorted(session.customers()) == ["acme", "bolt"]


def test_pack_says_what_it_did(place: Path) -> None:
    ran = run(*PACK.split(), cwd=place)
    assert ran.code == 0 and ran.err == ""
    assert "wrote packed.safetensors" in ran.out and "customers" in ran.out


def refuse(place: Path, command: str, *parts: str) -> None:
    ran = run_here(*command.split(), cwd=place)
    shown = ran.err
    assert ran.code == 2
    assert shown.startswith("Error: ") and len(shown.splitlines()) == 1, shown
    assert all(part in shown for part in parts), shown


def test_refused_in_one_line(place: Path, tiny_customer: Coefficients, exported: Path) -> None:
    refuse(place, "pack customers --bundle bundle -o customers/all.safetensors", "among the customers")
    refuse(place, "pack customers --bundle bundle -o nowhere/all.safetensors", "nowhere")
    refuse(place, "pack nowhere --bundle bundle -o packed.safetensors", "nowhere")
    refuse(place, "pack customers --bundle customers -o packed.safetensors", "customers is not a bundle")
    refuse(place, f"pack customers --bundle {exported} -o packed.safetensors", "is a merged bundle")
    bolt = place / "customers" / "bolt.safetensors"
    whole = bolt.read_bytes()
    bolt.write_bytes(whole[:-1])
    refuse(place, PACK, "bolt.safetensors is not a complete")
    write_coefficients(replace(tiny_customer, basis_digest="e" * 64), bolt)
    refuse(place, PACK, "bolt was trained on basis eeeeeeeeeeee")
    write_coefficients(replace(tiny_customer, head={"w": np.ones((4, 32), np.float32)}), bolt)
    refuse(place, PACK, "bolt has a head of its own")
    shutil.rmtree(place / "customers")
    (place / "customers").mkdir()
    refuse(place, PACK, "no customer to pack in customers")
    assert not (place / "packed.safetensors").exists()
