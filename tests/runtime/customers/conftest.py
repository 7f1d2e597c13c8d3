"""Sessions on the tiny bundle, and a packed file of three customers."""

from dataclasses import replace
from pathlib import Path

import pytest

from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.bundle.bundle import Manifest, open_bundle
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from tests.runtime.customers.packing import THRESHOLDS, scaled


@pytest.fixture(scope="module")
def session(switchable: Path) -> SwitchableSession:
    return SwitchableSession(open_bundle(switchable), threads=1)


@pytest.fixture
def fresh(switchable: Path) -> SwitchableSession:
    return SwitchableSession(open_bundle(switchable), rows=2, threads=1)


@pytest.fixture
def manifest(session: SwitchableSession) -> Manifest:
    return session.manifest


@pytest.fixture
def sample(tmp_path: Path, manifest: Manifest, tiny_customer: Coefficients) -> Path:
    path = tmp_path / "sample.safetensors"
    customers = {name: scaled(tiny_customer, index) for index, name in enumerate(["a", "b.c", "d" * 128])}
    customers["b.c"] = replace(customers["b.c"], thresholds=THRESHOLDS)
    write_packed(customers.items(), path, manifest)
    return path
