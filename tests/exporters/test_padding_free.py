"""Padding-free graphs: PyTorch's answers for every kind of mask, from work on tokens alone."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exporters.onnx import export_merged, export_switchable
from exporters.onnx.attention import Heads, attend, use_onnx_attention
from exporters.onnx.options import OnnxOptions
from exporters.onnx.padding_free import Packing, pack_blocks
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.runtime import open_bundle, open_session, verify
from qrlora_deploy.runtime.sessions.token_index import TOKEN_INDEX, kept_tokens, write_tokens
from tests.exporters.test_attention import save_classifier
from tests.exporters.test_switchable import save_encoder
from tests.tolerances import FP32_ONNX, FP32_SIDE_BRANCH

MASKS = {
    "full": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "right padding": [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
    "left padding": [[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 0, 1], [0, 1, 0, 1, 1, 0]],
}


def make_job(name: str, folder: Path, texts: Examples, **options: object) -> tuple[ExportJob, OnnxOptions]:
    """All linear layers of a small encoder."""
    checkpoint = open_checkpoint(str(save_encoder(name, folder / "base")))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton()), EnergyShare(0.5))
    return ExportJob(checkpoint, basis, folder / "bundle"), OnnxOptions(data=texts, padding_free=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["bert", "mpnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("roberta", "distilbert"))]
)
def test_every_encoder_agrees_with_pytorch(name: str, tmp_path: Path, texts: Examples) -> None:
    job, options = make_job(name, tmp_path, texts, head_labels=6)
    probe = job.checkpoint.load_model()
    if not use_onnx_attention(probe):
        with pytest.raises(InputError, match=r"cannot be made padding-free: its attention is its own"):
            export_switchable(job, options)
        return
    manifest = export_switchable(job, options)
    # Left padding and masks with holes are among the batches of the reference, and each has one error.
    assert manifest.parity.max_abs_error <= manifest.parity.bound < manifest.customer_effect / 10
    assert manifest.attention_nodes == 2
    assert [record.shape for record in manifest.inputs if record.name == TOKEN_INDEX] == [("tokens",)]
    assert verify(open_bundle(job.output)).passed


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("distilbert", "fp16"),
        ("mpnet", "int8"),
        pytest.param("mpnet", "fp16", marks=pytest.mark.slow),
        pytest.param("distilbert", "int8", marks=pytest.mark.slow),
    ],
)
def test_other_precisions(name: str, precision: str, tmp_path: Path, texts: Examples) -> None:
    job, options = make_job(name, tmp_path, texts, precision=precision)
    if not use_onnx_attention(job.checkpoint.load_model()):
        pytest.skip("this transformers gives DistilBERT an attention of its own")
    values = np.random.default_rng(5).uniform(0.3, 1.0, job.basis.total_rank).astype(np.float32)
    checkpoint = job.checkpoint
    customer = Coefficients(
        values, job.basis.digest, checkpoint.name, checkpoint.digest, checkpoint.task, checkpoint.labels
    )
    manifest = export_merged(
        ExportJob(checkpoint, job.basis, job.output, customer),
        OnnxOptions(data=texts, precision=precision, padding_free=True),
    )
    assert manifest.parity.max_abs_error <= manifest.parity.bound


def test_every_product_of_the_blocks_is_on_tokens(tmp_path: Path, texts: Examples) -> None:
    job, options = make_job("mpnet", tmp_path, texts)
    export_switchable(job, options)
    graph = onnx.shape_inference.infer_shapes(onnx.load(job.output / "model.onnx")).graph
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    products = [shapes[node.output[0]] for node in graph.node if node.op_type == "MatMul"]
    # Six layers of each of the two blocks, and R and Q beside each of them.
    assert len(products) == 36 and all(shape[:2] == [1, "tokens"] for shape in products)


def test_a_row_without_any_text_disturbs_no_other(tmp_path: Path, texts: Examples) -> None:
    job, options = make_job("distilbert", tmp_path, texts)
    if not use_onnx_attention(job.checkpoint.load_model()):
        pytest.skip("this transformers gives DistilBERT an attention of its own")
    export_switchable(job, options)
    session = open_session(job.output / "model.onnx", threads=1)
    width = next(value.shape[1] for value in session.get_inputs() if value.name == "coefficient_table")
    mask = np.array([[0] * 6, [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]], dtype=np.int64)
    inputs = {
        "input_ids": np.random.default_rng(3).integers(5, 100, mask.shape),
        "attention_mask": mask,
        "coefficient_table": np.random.default_rng(4).normal(size=(4, width)).astype(np.float32),
        "slot": np.array([3, 2, 1]),
    }

    def answer(rows: slice) -> np.ndarray:
        chosen = {name: value if name == "coefficient_table" else value[rows] for name, value in inputs.items()}
        logits: np.ndarray = session.run(None, chosen | {TOKEN_INDEX: kept_tokens(mask[rows])})[0]
        return logits

    found = answer(slice(0, 3))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[1:], answer(slice(1, 3)), **FP32_SIDE_BRANCH)


@pytest.mark.parametrize("kind", list(MASKS))
def test_lengths_and_a_mask_attend_alike(kind: str) -> None:
    mask = torch.tensor(MASKS[kind])
    packing = Packing()
    packing.fill(torch.from_numpy(kept_tokens(mask.numpy())), mask)
    query, key, value = (packing.pack(torch.randn(2, 6, 8)) for _ in range(3))
    heads = Heads(2, 2, 0.5)
    allowed = mask.bool()[:, None, None, :].expand(-1, 1, 6, -1)
    expected = attend(packing.unpack(query), packing.unpack(key), packing.unpack(value), allowed, heads)
    found = packing.attend(query, key, value, None, heads)
    torch.testing.assert_close(found, packing.pack(expected), **FP32_SIDE_BRANCH)


@pytest.fixture(scope="module")
def mpnet_graph(tmp_path_factory: pytest.TempPathFactory, texts: Examples) -> Path:
    job, options = make_job("mpnet", tmp_path_factory.mktemp("mpnet"), texts)
    export_switchable(job, options)
    return job.output / "model.onnx"


@pytest.mark.parametrize("kind", list(MASKS))
def test_a_token_that_is_computed_twice_changes_nothing(kind: str, mpnet_graph: Path) -> None:
    session = open_session(mpnet_graph, threads=1)
    mask = np.array(MASKS[kind], dtype=np.int64)
    table = next(value.shape for value in session.get_inputs() if value.name == "coefficient_table")
    random = np.random.default_rng(3)
    inputs = {
        "input_ids": random.integers(5, 100, mask.shape),
        "attention_mask": mask,
        "coefficient_table": random.normal(size=(3, table[1])).astype(np.float32),
        "slot": np.array([2, 1]),
    }
    kept = kept_tokens(mask)
    more = np.full(len(kept) + 5, 99)
    write_tokens(more, kept)
    expected = session.run(None, inputs | {TOKEN_INDEX: kept})[0]
    np.testing.assert_allclose(session.run(None, inputs | {TOKEN_INDEX: more})[0], expected, **FP32_SIDE_BRANCH)
    everything = np.arange(mask.size)
    np.testing.assert_allclose(session.run(None, inputs | {TOKEN_INDEX: everything})[0], expected, **FP32_ONNX)


@pytest.mark.parametrize("kind", list(MASKS))
def test_packing_and_unpacking(kind: str) -> None:
    mask = torch.tensor(MASKS[kind])
    tokens = torch.from_numpy(kept_tokens(mask.numpy()))
    packing = Packing()
    packing.fill(tokens, mask)
    states = torch.randn(2, 6, 3)
    packed = packing.pack(states)
    assert packed.shape == (1, len(tokens), 3)
    kept = np.isin(np.arange(12), tokens).reshape(2, 6)
    back = packing.unpack(packed)
    np.testing.assert_array_equal(back[kept], states[kept])
    # Of its own row, or a row of NaN would spoil the others.
    np.testing.assert_array_equal(back[~kept], states[:, :1].expand(-1, 6, -1)[~kept])
    np.testing.assert_array_equal(packing.by_token(torch.tensor([[7], [8]]))[0, :, 0] - 7, tokens // 6)


def test_what_cannot_be_padding_free_is_refused(tmp_path: Path, texts: Examples) -> None:
    job, options = make_job("deberta-v2", tmp_path, texts)
    with pytest.raises(InputError, match=r"DebertaV2\w+ cannot be made padding-free: its attention is its own"):
        export_switchable(job, options)
    checkpoint = open_checkpoint(str(save_classifier("GPT2", tmp_path / "gpt2")))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton()), FixedRank(2))
    with pytest.raises(InputError, match=r"padding_free is for encoders"):
        export_switchable(ExportJob(checkpoint, basis, tmp_path / "bundle"), OnnxOptions(data=texts, padding_free=True))
    with pytest.raises(InputError, match=r"one list of numbered blocks"):
        pack_blocks(torch.nn.Linear(2, 2), Packing())
    assert not (tmp_path / "bundle").exists()
