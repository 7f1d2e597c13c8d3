"""`customers erase`: a customer is gone from everywhere that was named, and from nowhere else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.customer_folder import CustomerFolder
from tests.cli.running import run, run_here, succeed_here

EVERYWHERE = "--customers customers --packed packed.safetensors"


@pytest.fixture
def place(tmp_path: Path, switchable: Path, tiny_customer: Coefficients) -> Path:
    """Two customers in a folder, with versions, and in a packed file."""
    folder = tmp_path / "customers"
    folder.mkdir()
    session = SwitchableSession(open_bundle(switchable), threads=1)
    write_packed(
        [(name, tiny_customer) for name in ("acme", "bolt")], tmp_path / "packed.safetensors", session.manifest
    )
    for factor in (1, 2):
        changed = replace(tiny_customer, values=tiny_customer.values * np.float32(factor))
        write_coefficients(changed, tmp_path / "made.safetensors")
        for name in ("acme", "bolt"):
            CustomerFolder(folder, session.check).put(name, (tmp_path / "made.safetensors").read_bytes())
    return tmp_path


def holding(place: Path, text: str) -> list[str]:
    """Everything below a folder whose name or content has a text in it."""
    found = [
        path
        for path in place.rglob("*")
        if text in path.name or (path.is_file() and text.encode() in path.read_bytes())
    ]
    return [path.relative_to(place).as_posix() for path in found]


def test_a_customer_is_gone_from_everywhere_that_was_named(place: Path) -> None:
    assert len(holding(place, "acme")) == 3
    bolt = holding(place, "bolt")
    erased = succeed_here(["customers", "erase", "acme", *EVERYWHERE.split()], place)
    assert erased == {"customer": "acme", "erased_from": ["packed.safetensors", "customers"]}
    assert holding(place, "acme") == [] and holding(place, "bolt") == bolt
    again = run("customers", "erase", "acme", *EVERYWHERE.split(), cwd=place)
    assert again.code == 2 and "acme is in none of customers, packed.safetensors" in again.err


def test_only_what_was_named_is_changed(place: Path) -> None:
    packed = (place / "packed.safetensors").read_bytes()
    succeed_here(["customers", "erase", "acme", "--customers", "customers"], place)
    assert (place / "packed.safetensors").read_bytes() == packed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("acme", "--customers DIR"),
        (f"../acme {EVERYWHERE}", "no customer id"),
        ("acme --customers nowhere", "nowhere"),
        ("acme --packed made.safetensors", "qrlora-packed"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_changed(place: Path, arguments: str, line: str) -> None:
    before = holding(place, "acme")
    ran = run_here("customers", "erase", *arguments.split(), cwd=place)
    assert ran.code == 2 and line in ran.err and holding(place, "acme") == before
