"""Erasing from a packed file: what is left is the file that everybody else would have been packed into."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrlora_deploy.errors import FileFormatError, InputError, QrloraError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.bundle.manifest import Manifest
from qrlora_deploy.runtime.customers import packed_header
from qrlora_deploy.runtime.customers.packed_check import check_packed
from qrlora_deploy.runtime.customers.packed_erasing import erase_packed
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from tests.damaging import damaged_bytes
from tests.runtime.customers.test_store import ALLOWED

IDS = st.text(ALLOWED, min_size=1, max_size=128).filter(lambda name: name[0] != ".")


@pytest.fixture(scope="module")
def manifest(switchable: Path) -> Manifest:
    return open_bundle(switchable).manifest


def made(customer: Coefficients, names: list[str]) -> Iterator[tuple[str, Coefficients]]:
    """Customers with other numbers each; every third one has thresholds."""
    for number, name in enumerate(names):
        values = customer.values * np.float32(1 + sum(name.encode()) / 100)
        thresholds = (0.1, 0.5, 0.25, (1 + number % 90) / 100) if len(name) % 3 == 0 else ()
        yield name, replace(customer, values=values, thresholds=thresholds)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    names=st.lists(IDS, min_size=2, max_size=20, unique=True),
    chance=st.randoms(use_true_random=False),
    piece_bytes=st.integers(1, 20_000),
    dtype=st.sampled_from(["fp32", "fp16"]),
)
def test_what_is_left_is_what_the_others_give(
    tmp_path: Path,
    manifest: Manifest,
    tiny_customer: Coefficients,
    names: list[str],
    chance: random.Random,
    piece_bytes: int,
    dtype: str,
) -> None:
    path, expected = tmp_path / "packed.safetensors", tmp_path / "expected.safetensors"
    customers = dict(made(tiny_customer, names))
    gone = chance.choice(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_header, "PIECE_BYTES", piece_bytes)
        write_packed(customers.items(), path, manifest, dtype=dtype)
        assert erase_packed(path, gone)
        assert check_packed(path).customers == len(names) - 1
        assert check_packed(path).tuned == sum(bool(it.thresholds) for name, it in customers.items() if name != gone)
        others = [(name, customer) for name, customer in customers.items() if name != gone]
        write_packed(others, expected, manifest, dtype=dtype)
        assert path.read_bytes() == expected.read_bytes()
        assert not erase_packed(path, gone)
    assert path.read_bytes() == expected.read_bytes()


def test_the_last_one_is_refused(tmp_path: Path, manifest: Manifest, tiny_customer: Coefficients) -> None:
    path = tmp_path / "packed.safetensors"
    write_packed(made(tiny_customer, ["acme"]), path, manifest)
    before = path.read_bytes()
    with pytest.raises(InputError, match="nobody but acme; remove the file"):
        erase_packed(path, "acme")
    assert path.read_bytes() == before


def test_a_damaged_file_is_left_as_it_is(tmp_path: Path, manifest: Manifest, tiny_customer: Coefficients) -> None:
    path = tmp_path / "packed.safetensors"
    write_packed(made(tiny_customer, ["acme", "bolt", "corso"]), path, manifest)
    whole = path.read_bytes()
    for seed in range(100):
        damaged = damaged_bytes(whole, random.Random(seed))
        path.write_bytes(damaged)
        if damaged == whole:
            continue
        with pytest.raises(QrloraError) as caught:
            erase_packed(path, "bolt")
        assert isinstance(caught.value, FileFormatError) and path.read_bytes() == damaged
