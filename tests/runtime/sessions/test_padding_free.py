"""Sessions of padding-free bundles: the same answers as without buckets, and few numbers of tokens."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.onnx import export_switchable
from exporters.onnx.attention import use_onnx_attention
from exporters.onnx.options import OnnxOptions
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import ProviderError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.runtime import Buckets, Device, SwitchableSession, open_bundle, verify
from qrlora_deploy.runtime.sessions.token_index import STEPS, kept_tokens, padded_tokens, write_tokens
from tests.exporters.test_switchable import save_encoder
from tests.runtime.fire import made_up_customer, made_up_inputs
from tests.tolerances import FP32_ONNX

BUCKETS = Buckets((1, 4, 32), (12, 24))


@pytest.fixture(scope="module", params=["mpnet", "distilbert"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: Examples) -> Path:
    """Switchable: attention with a mask, for the bias of positions, and with lengths."""
    folder = tmp_path_factory.mktemp("padding-free")
    checkpoint = open_checkpoint(str(save_encoder(request.param, folder / "base")))
    if not use_onnx_attention(checkpoint.load_model()):
        pytest.skip(f"this transformers gives {request.param} an attention of its own")
    targets = choose_targets(checkpoint.skeleton(), ("q", "v") if request.param == "mpnet" else ("q_lin", "v_lin"))
    basis = factorize(checkpoint, targets, EnergyShare(0.5))
    export_switchable(
        ExportJob(checkpoint, basis, folder / "bundle"), OnnxOptions(data=texts, head_labels=6, padding_free=True)
    )
    return folder / "bundle"


def open_pair(bundle: Path, provider: str = "cpu") -> tuple[SwitchableSession, SwitchableSession]:
    """On the CPU without buckets, and on `provider` with them; nine customers in each."""
    opened = open_bundle(bundle)
    try:
        both = SwitchableSession(opened, threads=1), SwitchableSession(opened, provider, threads=1, buckets=BUCKETS)
    except ProviderError as error:
        pytest.skip(f"no CUDA execution provider here: {error}")
    for session in both:
        for number in range(9):
            session.load(f"c{number}", made_up_customer(session.manifest, number, (None, 2, 6)[number % 3]))
    return both


def check_batches(plain: SwitchableSession, bucketed: SwitchableSession) -> None:
    """Batches of many sizes, padded on the right, on the left and with holes; buckets larger and smaller in turn."""
    names: list[str | None] = [None, *plain.customers()]
    random = np.random.default_rng(1)
    for batch, length in ((1, 3), (4, 12), (31, 24), (2, 13), (33, 24), (5, 20), (32, 24), (3, 12)):
        inputs = made_up_inputs(plain.manifest, batch, length, seed=batch)
        lengths = random.integers(1, length + 1, batch)
        inputs["attention_mask"][:] = np.arange(length) < lengths[:, None]
        inputs["attention_mask"][batch // 2] = inputs["attention_mask"][batch // 2, ::-1]
        inputs["attention_mask"][0, 1::2] = 0
        owners = [names[row % len(names)] for row in range(batch)]
        expected, labels = plain.predict(inputs, owners)
        found, found_labels = bucketed.predict(inputs, owners)
        np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
        np.testing.assert_allclose(found, expected, **FP32_ONNX)
        assert found_labels == labels


def test_a_bucket_changes_no_answer(bundle: Path) -> None:
    check_batches(*open_pair(bundle))


@pytest.mark.parametrize("provider", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_customer_whose_numbers_overflow_spoils_no_other_row(bundle: Path, provider: str) -> None:
    for session in open_pair(bundle, provider):
        inputs = made_up_inputs(session.manifest, 4, 12)
        inputs["attention_mask"][:] = np.arange(12) < np.array([12, 5, 3, 9])[:, None]
        expected = session.predict(inputs, ["c0"] * 4)[0]
        large = np.full_like(made_up_customer(session.manifest, 0).values, 3e38)
        session.load("huge", replace(made_up_customer(session.manifest, 0), values=large))
        for row in range(4):
            others = np.arange(4) != row
            found = session.predict(inputs, [("c0", "huge")[place == row] for place in range(4)])[0]
            assert not np.isfinite(found[row, :4]).any()
            np.testing.assert_allclose(found[others], expected[others], **FP32_ONNX)


def test_an_onnx_runtime_that_ignores_lengths_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, refused in (("1.24.4", True), ("1.25.0", False), ("2.0.1", False)):
        monkeypatch.setattr("onnxruntime.__version__", version)
        with (
            pytest.raises(ProviderError, match=r"ONNX Runtime 1\.24\.4 .* install 1\.25") if refused else nullcontext()
        ):
            SwitchableSession(open_bundle(bundle), Device(configure=lambda _: None), threads=1)


@pytest.mark.gpu
def test_captured_graphs_of_every_number_of_tokens_equal_the_cpu(bundle: Path) -> None:
    plain, captured = open_pair(bundle, "cuda")
    assert verify(open_bundle(bundle), "cuda").passed
    for _ in range(3):
        check_batches(plain, captured)


@given(rows=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6), more=st.integers(0, 9))
def test_kept_tokens_are_those_of_the_mask_and_the_first_of_each_row(rows: list[list[bool]], more: int) -> None:
    mask = np.array(rows).astype(np.int64)
    before = mask.copy()
    expected = [5 * row + place for row in range(len(rows)) for place in range(5) if place == 0 or rows[row][place]]
    assert kept_tokens(mask).tolist() == expected and (mask == before).all()
    target = np.full(len(expected) + more, 77)
    write_tokens(target, kept_tokens(mask))
    assert target.tolist() == expected + [0] * more


@given(batch=st.integers(1, 80), length=st.integers(1, 520))
def test_a_bucket_has_few_numbers_of_tokens(batch: int, length: int) -> None:
    whole = batch * length
    found = [padded_tokens(tokens, batch, length) for tokens in range(batch, whole + 1)]
    assert all(tokens <= size <= whole for tokens, size in enumerate(found, batch))
    assert len(set(found)) <= STEPS and found == sorted(found)
