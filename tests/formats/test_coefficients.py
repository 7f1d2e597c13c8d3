"""A customer's file: what is written reads back, golden bytes stay readable, everything else is refused in one line."""

import os
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qrlora_deploy.errors import BasisMismatchError, FileFormatError, InputError, QrloraError
from qrlora_deploy.formats.basis import read_basis
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients, write_coefficients
from qrlora_deploy.formats.customer_files import version_of
from qrlora_deploy.io.files import digest_file
from tests.forging import Change, forge
from tests.golden.make import (
    BASIS_FILE,
    COEFFICIENTS_2_FILE,
    COEFFICIENTS_FILE,
    golden_basis,
    golden_coefficients,
    golden_thresholds,
)

SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
HEADS = st.dictionaries(
    st.from_regex(r"[a-z]{1,4}\.(weight|bias)", fullmatch=True),
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=3), elements=FINITE),
    max_size=2,
)


def assert_same(found: Coefficients, expected: Coefficients) -> None:
    for name, value in vars(replace(expected)).items():
        if name not in ("values", "head"):
            assert getattr(found, name) == value, name
    assert found.digest == expected.digest and found.values.dtype == np.float32
    assert found.values.tobytes() == expected.values.tobytes() and found.head.keys() == expected.head.keys()
    assert all(found.head[name].tobytes() == array.tobytes() for name, array in expected.head.items())


def assert_refused(path: Path, message: str | None = None) -> None:
    """One line that names the file, and never another kind of exception."""
    with pytest.raises(FileFormatError, match=message) as caught:
        read_coefficients(path)
    assert path.name in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


@SAME_FOLDER
@given(
    values=hnp.arrays(np.float32, st.integers(1, 9), elements=FINITE),
    head=HEADS,
    texts=st.tuples(TEXT, TEXT, TEXT, TEXT, TEXT),
    labels=st.lists(TEXT, max_size=3),
    training=st.dictionaries(TEXT, st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT, max_size=3),
)
def test_write_then_read_is_the_identity(
    tmp_path: Path, values: np.ndarray, head: dict, texts: tuple, labels: list[str], training: dict
) -> None:
    basis_digest, base_name, base_digest, task, basis_file = texts
    customer = Coefficients(
        values, basis_digest, base_name, base_digest, task, tuple(labels), head, basis_file, training
    )
    write_coefficients(customer, tmp_path / "acme.safetensors")
    if Path(basis_file).is_absolute():
        customer = replace(customer, basis_file=os.path.relpath(basis_file, tmp_path))
    assert_same(read_coefficients(tmp_path / "acme.safetensors"), customer)


def test_thresholds_are_read_back_and_are_part_of_what_a_customer_does(tmp_path: Path) -> None:
    plain, path = golden_coefficients(), tmp_path / "acme.safetensors"
    assert plain.thresholds == (), "a file of an earlier version has none"
    tuned = replace(plain, thresholds=(0.1 + 0.2, 1e-300))
    tuned.save(path)
    assert_same(read_coefficients(path), tuned)
    assert len({plain.digest, tuned.digest, replace(plain, thresholds=(0.3, 1e-300)).digest}) == 3
    assert version_of(tuned) != version_of(plain)
    # What has none is written as ever, byte for byte.
    plain.save(path)
    assert digest_file(path) == digest_file(COEFFICIENTS_FILE)


@pytest.mark.parametrize(
    ("thresholds", "reason"),
    [
        ((0.5,), "there are 1 thresholds, but 2 labels"),
        ((0.5, 1.0), "a threshold is a probability between 0 and 1, not 1.0"),
        ((0.0, 0.5), "a threshold is a probability between 0 and 1, not 0.0"),
        ((0.5, float("nan")), "a threshold is a probability between 0 and 1, not nan"),
    ],
)
def test_thresholds_that_are_none_are_refused(tmp_path: Path, thresholds: tuple[float, ...], reason: str) -> None:
    with pytest.raises(FileFormatError, match=reason):
        replace(golden_coefficients(), thresholds=thresholds).save(tmp_path / "acme.safetensors")


def test_golden_thresholds_read_to_known_values(tmp_path: Path) -> None:
    customer = read_coefficients(COEFFICIENTS_2_FILE)
    assert_same(customer, golden_thresholds())
    assert customer.thresholds == (0.25, 0.625) and customer.task == "text-multi-label"
    write_coefficients(golden_thresholds(), tmp_path / "acme.safetensors")
    assert (tmp_path / "acme.safetensors").read_bytes() == COEFFICIENTS_2_FILE.read_bytes()
    assert digest_file(COEFFICIENTS_2_FILE) == "fa61988c735dbc8151c3407fb1d125493da694f63a2376bc483bed41b24035f6"
    # A release that knows version 1 alone must refuse it, and what version 1 passed over means nothing.
    older = forge(COEFFICIENTS_2_FILE, tmp_path / "older.safetensors", put_version(1))
    assert read_coefficients(older).thresholds == ()


def put_version(version: int) -> Change:
    return lambda metadata, tensors: metadata.update(format_version=version)


def test_golden_file_reads_to_known_values() -> None:
    customer = read_coefficients(COEFFICIENTS_FILE)
    assert_same(customer, golden_coefficients())
    assert customer.values.tolist() == [0.5, -0.25, 8] and customer.labels == ("no", "yes, naïve")
    assert customer.head["classifier.weight"].tolist() == [[1, 2, 3], [-1, 0, 0.5]]
    assert customer.digest == "578e92e161ca0765c9f3b4038ca7ad4d3ffa98ffbc8495d38084b0f3b5d9aa90"
    customer.check_fits(read_basis(BASIS_FILE))


def test_golden_bytes_are_written_again(tmp_path: Path) -> None:
    write_coefficients(golden_coefficients(), tmp_path / "acme.safetensors")
    assert (tmp_path / "acme.safetensors").read_bytes() == COEFFICIENTS_FILE.read_bytes()
    assert digest_file(COEFFICIENTS_FILE) == "b0c176a2b9072086ae834990f5e4543ddb222725eb76763e2f2ac02ae938b11b"


def test_a_customer_of_641_values_takes_few_kilobytes(tmp_path: Path) -> None:
    customer = replace(golden_coefficients(), values=np.ones(641, np.float32), head={})
    write_coefficients(customer, tmp_path / "acme.safetensors")
    assert (tmp_path / "acme.safetensors").stat().st_size < 4096


def test_digest_is_of_what_the_customer_does() -> None:
    customer = golden_coefficients()
    assert replace(customer, training={}, labels=(), base_name="").digest == customer.digest
    reordered = dict(reversed(customer.head.items()))
    assert replace(customer, head=reordered).digest == customer.digest
    assert replace(customer, head={}).digest != customer.digest
    assert replace(customer, values=customer.values[::-1]).digest != customer.digest


def test_another_basis_is_refused_and_both_are_named() -> None:
    customer, basis = golden_coefficients(), golden_basis()
    with pytest.raises(BasisMismatchError, match=f"basis 000000000000, but this basis is {basis.digest[:12]}"):
        replace(customer, basis_digest="0" * 64).check_fits(basis)
    with pytest.raises(InputError, match=r"expected 3 values \(2\+1\), found 2"):
        replace(customer, values=customer.values[:2]).check_fits(basis)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_not_written(tmp_path: Path, bad: float) -> None:
    customer, path = golden_coefficients(), tmp_path / "acme.safetensors"
    path.write_text("old")
    with pytest.raises(InputError, match="coefficients holds NaN or Inf"):
        write_coefficients(replace(customer, values=np.array([1, bad, 2], np.float32)), path)
    with pytest.raises(InputError, match="classifier.bias holds NaN or Inf"):
        write_coefficients(replace(customer, head={"classifier.bias": np.array([bad], np.float32)}), path)
    with pytest.raises(InputError, match="fp32, not float64"):
        write_coefficients(replace(customer, values=np.ones(3)), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    whole, path = COEFFICIENTS_FILE.read_bytes(), tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert_refused(path, "not a complete safetensors file")


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_any_changed_byte_never_gives_another_customer(tmp_path: Path, flip: int) -> None:
    whole, path = COEFFICIENTS_FILE.read_bytes(), tmp_path / "changed.safetensors"
    expected, refused = golden_coefficients(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        try:
            found = read_coefficients(path)
        except QrloraError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            # A space of the header, or the case of an escape: other bytes of the same meaning.
            assert_same(found, expected)
    assert refused > 0.95 * len(whole)


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1])
def test_a_giant_header_takes_no_memory(tmp_path: Path, length: int) -> None:
    path = tmp_path / "giant.safetensors"
    path.write_bytes(struct.pack("<Q", length) + COEFFICIENTS_FILE.read_bytes()[8:])
    assert_refused(path)


def put(name: str, array: np.ndarray) -> Change:
    return lambda metadata, tensors: tensors.update({name: array})


def deep(levels: int) -> dict[str, Any]:
    """Objects in one another."""
    made: dict[str, Any] = {}
    for _ in range(levels - 1):
        made = {"a": made}
    return made


FORGERIES: dict[str, tuple[Change, str]] = {
    "newer version": (lambda m, t: m.update(format_version=3), "format version 3; this version reads 1 and 2"),
    "version of text": (lambda m, t: m.update(format_version="1"), "format version '1'"),
    "other format": (lambda m, t: m.update(format="qrlora-basis"), "not a qrlora-coefficients file"),
    "no values": (lambda m, t: t.pop("coefficients"), "the tensor 'coefficients' is missing"),
    "no basis": (lambda m, t: m.pop("basis_digest"), "basis_digest: Field required"),
    "no labels": (lambda m, t: m.pop("labels"), "labels: Field required"),
    "labels null": (lambda m, t: m.update(labels=None), "labels: Input should be a valid list"),
    "labels a text": (lambda m, t: m.update(labels="abcd"), "labels: Input should be a valid list"),
    "a label null": (lambda m, t: m.update(labels=["a", None]), "labels.1: Input should be a valid string"),
    "a label of a number": (lambda m, t: m.update(labels=[1, 2]), "labels.0: Input should be a valid string"),
    "labels of objects": (lambda m, t: m.update(labels={"a": 1}), "labels: Input should be a valid list"),
    "half a character": (lambda m, t: m.update(labels=["\ud800"]), "holds half of a character"),
    "training a number": (lambda m, t: m.update(training=3), "training: Input should be a valid dictionary"),
    "training a text": (lambda m, t: m.update(training="abc"), "training: Input should be a valid dictionary"),
    "training deep": (lambda m, t: m.update(training=deep(70)), "nested deeper than 64 levels"),
    "version true": (lambda m, t: m.update(format_version=True), "format version True; this version reads 1"),
    "version 1.0": (lambda m, t: m.update(format_version=1.0), "format version 1.0; this version reads 1"),
    "task null": (lambda m, t: m.update(task=None), "task: Input should be a valid string"),
    "digest of a number": (lambda m, t: m.update(base_digest=5), "base_digest: Input should be a valid string"),
    "a long name": (lambda m, t: t.update({"y" * 50_000: np.ones(3, np.float32)}), "unexpected tensor 'yyyy"),
    "a long version": (lambda m, t: m.update(format_version="y" * 50_000), "format version 'yyyy"),
    "NaN": (put("coefficients", np.array([1, np.nan, 2], np.float32)), "coefficients holds NaN or Inf"),
    "infinite head": (put("head.classifier.bias", np.array([np.inf, 1], np.float32)), "classifier.bias holds NaN"),
    "empty": (put("coefficients", np.ones(0, np.float32)), "unexpected tensor"),
    "a matrix": (put("coefficients", np.ones((3, 1), np.float32)), "unexpected tensor"),
    "fp64": (put("coefficients", np.ones(3)), "unexpected tensor"),
    "fp16": (put("coefficients", np.ones(3, np.float16)), "unexpected tensor"),
    "another tensor": (put("more", np.ones(3, np.float32)), "unexpected tensor 'more'"),
    "a head of three dimensions": (put("head.a", np.ones((1, 1, 1), np.float32)), "unexpected tensor 'head.a'"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_files_are_refused(tmp_path: Path, name: str) -> None:
    change, message = FORGERIES[name]
    assert_refused(forge(COEFFICIENTS_FILE, tmp_path / "forged.safetensors", change), message)


def test_a_wrong_length_or_basis_reads_but_does_not_fit(tmp_path: Path) -> None:
    short = read_coefficients(forge(COEFFICIENTS_FILE, tmp_path / "a", put("coefficients", np.ones(2, np.float32))))
    with pytest.raises(InputError, match="found 2"):
        short.check_fits(golden_basis())
    other = read_coefficients(forge(COEFFICIENTS_FILE, tmp_path / "b", lambda m, t: m.update(basis_digest="f" * 64)))
    with pytest.raises(BasisMismatchError, match="ffffffffffff"):
        other.check_fits(golden_basis())


def test_metadata_of_another_customer_is_noticed(tmp_path: Path) -> None:
    """Header of one file, tensors of another of the same shapes."""
    path = tmp_path / "other.safetensors"
    customer = golden_coefficients()
    write_coefficients(replace(customer, values=customer.values * 2), path)
    one, other = COEFFICIENTS_FILE.read_bytes(), path.read_bytes()
    start = 8 + struct.unpack("<Q", one[:8])[0]
    assert other[8:start] != one[8:start] and len(one) == len(other)
    path.write_bytes(one[:start] + other[start:])
    assert_refused(path, "was changed after it was written")


def test_a_basis_is_no_customer_and_the_other_way_round() -> None:
    assert_refused(BASIS_FILE, "not a qrlora-coefficients file")
    with pytest.raises(FileFormatError, match="not a qrlora-basis file"):
        read_basis(COEFFICIENTS_FILE)


KILLED = """
import os, signal, sys
from pathlib import Path
from qrlora_deploy.io import files
from qrlora_deploy.formats.coefficients import read_coefficients, write_coefficients

def die(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)

files.flush_file = die
write_coefficients(read_coefficients(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_killed_in_the_middle_of_a_write_the_old_customer_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "acme.safetensors"
    old = replace(golden_coefficients(), values=np.array([1, 2, 3], np.float32))
    write_coefficients(old, path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(COEFFICIENTS_FILE), str(path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "half of the new file lies beside the old one"
    assert_same(read_coefficients(path), old)
    write_coefficients(golden_coefficients(), path)
    assert_same(read_coefficients(path), golden_coefficients())
