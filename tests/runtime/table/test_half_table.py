"""A bundle with an fp16 coefficient table: what its rounding costs, what it refuses, and what it says of itself."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.onnx import export_switchable
from exporters.onnx.options import OnnxOptions
from exporters.onnx.verifying import verify_against
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import FileFormatError, InputError, ProviderError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.runtime import Buckets, Bundle, SwitchableSession, load_packed, open_bundle, verify
from qrlora_deploy.runtime.bundle.row_layout import HEAD_TABLE, TABLE, TableLayout
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from tests.runtime.fire import fire, made_up_customer, made_up_inputs
from tests.tolerances import FP16_TABLE, FP32_ONNX, ONE_ROUNDING


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tiny_basis: Basis, texts: Examples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundles") / "half"
    checkpoint = open_checkpoint(str(tiny_base))
    export_switchable(
        ExportJob(checkpoint, tiny_basis, output), OnnxOptions(data=texts, head_labels=6, table_dtype="fp16")
    )
    return output


@pytest.fixture(scope="module")
def half(folder: Path) -> Bundle:
    return open_bundle(folder)


def test_the_bundle_says_so_and_its_parity_check_covers_it(half: Bundle, switchable: Path) -> None:
    dtypes = {record.name: record.dtype for record in half.manifest.inputs}
    assert (dtypes[TABLE], dtypes[HEAD_TABLE]) == ("float16", "float32")
    assert half.manifest.table_dtype == "fp16" and half.manifest.precision == "fp32"
    report, plain = verify(half), verify(open_bundle(switchable))
    assert report.passed and report.max_abs_error > 4 * plain.max_abs_error, "the rounding must be seen"
    assert plain.bound < report.bound < 1e-2 and (report.effect_correlation or 0) > 0.9999
    assert "`coefficient_table` float16 [slots," in (half.folder / "README.md").read_text()


def test_every_row_is_its_customers_within_the_rounding(half: Bundle, switchable: Path) -> None:
    """Against the fp32 table, whose customers are also given after the rounding: then only sums differ."""
    sessions = [SwitchableSession(open_bundle(switchable), threads=1) for _ in range(2)]
    found = SwitchableSession(half, rows=2, threads=1)
    names: list[str | None] = [None, *(f"c{number}" for number in range(7))]
    for number, name in enumerate(names[1:]):
        customer = made_up_customer(half.manifest, number, (None, 3, 6)[number % 3])
        rounded = replace(customer, values=customer.values.astype(np.float16).astype(np.float32))
        for session, version in zip((found, *sessions), (customer, customer, rounded), strict=True):
            session.load(str(name), version)
    inputs = made_up_inputs(half.manifest, len(names), 12)
    logits, exact, same = (session.predict(inputs, names)[0] for session in (found, *sessions))
    np.testing.assert_array_equal(np.isneginf(logits), np.isneginf(exact))
    np.testing.assert_allclose(logits, exact, **FP16_TABLE)
    np.testing.assert_array_equal(logits, same)
    assert found.table.memory.size_bytes < sessions[0].table.memory.size_bytes


def test_the_export_is_compared_with_pytorch_on_a_customer_of_ones_own(
    half: Bundle, tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, texts: Examples
) -> None:
    assert verify_against(half, open_checkpoint(str(tiny_base)), tiny_basis, tiny_customer, texts).passed


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    scale=st.floats(1e-3, 6e4),
    seed=st.integers(0, 99),
)
def test_a_row_is_rounded_once_or_refused(ranks: list[int], scale: float, seed: int) -> None:
    values = (np.random.default_rng(seed).uniform(-1.2, 1.2, sum(ranks)) * scale).astype(np.float32)
    half, single = TableLayout(ranks, "fp16"), TableLayout(ranks)
    # The first number that is rounded to infinity lies half a step above the largest.
    if np.abs(values).max() >= 65520:
        with pytest.raises(InputError, match="more than fp16 can hold"):
            half.row(values)
        return
    row = half.row(values)
    assert row.dtype == np.float16
    # The second part is for numbers that fp16 holds without a leading one.
    np.testing.assert_allclose(row, single.row(values), rtol=ONE_ROUNDING["float16"], atol=2.0**-25)


@pytest.mark.parametrize("value", [70000.0, -65520.0, np.inf, np.nan])
def test_a_number_that_fp16_cannot_hold_is_refused_by_the_customers_name(half: Bundle, value: float) -> None:
    session = SwitchableSession(half, threads=1)
    customer = made_up_customer(half.manifest, 1)
    session.load("acme", customer)
    before = session.table.memory.parts[TABLE].read_rows(0, 4)
    wrong = customer.values.copy()
    wrong[3] = value
    with pytest.raises(InputError, match=r"^acme: the coefficient .* is more than fp16 can hold \(65504\)") as caught:
        session.load("acme", replace(customer, values=wrong))
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(session.table.memory.parts[TABLE].read_rows(0, 4), before)


@pytest.mark.parametrize(("name", "dtype"), [(TABLE, "float32"), (TABLE, "int64"), (HEAD_TABLE, "float16")])
def test_a_manifest_that_speaks_of_another_dtype_is_refused(
    folder: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    record = json.loads((copy / "manifest.json").read_text())
    next(item for item in record["inputs"] if item["name"] == name)["dtype"] = dtype
    (copy / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(FileFormatError, match=r"dtype|its inputs is not as in reference\.safetensors"):
        SwitchableSession(open_bundle(copy), threads=1)


@pytest.mark.slow
def test_swaps_under_fire_give_no_mixture(half: Bundle) -> None:
    report = fire(half.folder, seconds=10)
    assert report.wrong_count == 0 and report.errors == [], report
    assert report.rows > 500 and report.swaps > 500, report


@pytest.mark.gpu
@pytest.mark.parametrize("buckets", [None, Buckets((8,), (16,))], ids=["plain", "captured graphs"])
def test_a_packed_file_and_swaps_on_a_gpu_answer_as_on_the_cpu(
    half: Bundle, tmp_path: Path, buckets: Buckets | None
) -> None:
    try:
        device = SwitchableSession(half, "cuda", rows=2, buckets=buckets)
    except ProviderError as error:
        pytest.skip(f"no CUDA execution provider here: {error}")
    host = SwitchableSession(half, rows=2)
    customers = {f"c{number}": made_up_customer(half.manifest, number) for number in range(3000)}
    write_packed(customers.items(), tmp_path / "packed.safetensors", half.manifest)
    inputs = made_up_inputs(half.manifest, 8, 12)
    for turn in range(6):
        if turn % 3 == 0:
            for session in (host, device):
                load_packed(session, tmp_path / "packed.safetensors")
        names: list[str | None] = [None, *(f"c{number}" for number in range(400 * turn, 400 * turn + 7))]
        for number, name in enumerate(names[1:4]):
            for session in (host, device):
                session.load(str(name), made_up_customer(half.manifest, 5000 + 10 * turn + number))
        found, expected = (session.predict(inputs, names)[0] for session in (device, host))
        np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
        np.testing.assert_allclose(found, expected, **FP32_ONNX)
    rows = [session.table.memory.parts[TABLE].read_rows(0, 3000) for session in (host, device)]
    np.testing.assert_array_equal(*rows)
