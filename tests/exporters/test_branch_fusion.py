"""Side branches inside the products of their layers: the same logits, and fewer operators."""

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from exporters.onnx.attention import use_onnx_attention
from exporters.onnx.bias_folding import fold_attention_biases
from exporters.onnx.branch_fusion import FusedBranch, fuse_branches, fuses
from exporters.onnx.customer_rows import CustomerRows, _runs
from exporters.onnx.graph import write_graph
from exporters.onnx.padding_free import Packing
from exporters.onnx.switchable import TableBranch, make_switchable
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE
from qrlora_deploy.runtime.sessions.token_index import TOKEN_INDEX, kept_tokens
from tests.exporters.test_bias_folding import IDS, MASK, load
from tests.tolerances import FP32_SIDE_BRANCH

RANK = 8


def switchable(name: str, targets: tuple[str, ...], folder: Path) -> tuple[torch.nn.Module, CustomerRows, torch.Tensor]:
    """A model whose biases are not zero, with branches apart, and a table without zeros."""
    checkpoint, model = load(name, folder)
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton(), targets or None), FixedRank(RANK))
    rows = make_switchable(model, basis)
    return model, rows, torch.randn(3, rows.layout.width, generator=torch.Generator().manual_seed(2))


def answer(model: torch.nn.Module, rows: CustomerRows, table: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        rows.fill({TABLE: table, SLOT: torch.tensor([2, 1])})
        return model(input_ids=IDS, attention_mask=MASK).logits.numpy()


@pytest.mark.parametrize(
    ("name", "targets", "parts"),
    [
        ("bert", ("query", "value"), (16, 16)),
        ("bert", ("query",), (8, 8)),
        # Query, key and value, the output layer, and both layers of the feed-forward block.
        ("bert", (), (24, 8, 8, 8) * 2),
        ("mpnet", ("q", "v", "o"), (16, 8) * 2),
        ("distilbert", ("k_lin", "v_lin", "lin1"), (16, 8) * 2),
    ],
)
def test_joined_branches_give_the_same_logits(
    name: str, targets: tuple[str, ...], parts: tuple[int, ...], tmp_path: Path
) -> None:
    model, rows, table = switchable(name, targets, tmp_path)
    fold_attention_biases(model)
    expected = answer(model, rows, table)
    fuse_branches(model, rows)
    assert rows.parts == parts
    np.testing.assert_allclose(answer(model, rows, table), expected, **FP32_SIDE_BRANCH)
    assert np.abs(answer(model, rows, table * 0) - expected).max() > 0.01, "the customers have no effect"
    assert not any(isinstance(module, TableBranch) for module in model.modules())


def test_a_layer_that_reads_something_else_is_no_neighbour(tmp_path: Path) -> None:
    model, rows, table = switchable("bert", ("query", "value"), tmp_path)
    expected = answer(model, rows, table)
    first = model.bert.encoder.layer[0].attention.self
    # From here on the value of the first block reads another tensor than its query, with the same numbers.
    first.value.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 0,))
    hooked = answer(model, rows, table)
    np.testing.assert_array_equal(hooked, expected)
    fuse_branches(model, rows)
    assert rows.parts == (8, 8, 16)
    np.testing.assert_allclose(answer(model, rows, table), expected, **FP32_SIDE_BRANCH)


def test_a_layer_that_did_not_run_is_no_neighbour(tmp_path: Path) -> None:
    model, rows, table = switchable("bert", ("query", "value"), tmp_path)
    expected = answer(model, rows, table)
    del rows.inputs[0], rows.inputs[1]
    fuse_branches(model, rows)
    assert rows.parts == (8, 8, 16)
    np.testing.assert_allclose(answer(model, rows, table), expected, **FP32_SIDE_BRANCH)


@pytest.mark.parametrize(
    ("name", "projections", "packed"),
    [
        ("bert", ("query", "value"), False),
        ("mpnet", ("q", "v"), False),
        ("mpnet", ("q", "v"), True),
        ("distilbert", ("q_lin", "v_lin"), True),
    ],
)
def test_the_graph_agrees_with_pytorch_and_has_three_operators_more_for_a_block(
    name: str, projections: tuple[str, ...], packed: bool, tmp_path: Path
) -> None:
    model, rows, table = switchable(name, projections, tmp_path)
    expected = answer(model, rows, table)
    if packed and not use_onnx_attention(load(name, tmp_path / "probe")[1]):
        pytest.skip(f"{name}'s attention is its own in transformers 4")
    finish = partial(fuse_branches, model, rows)
    write_graph(model, ("input_ids", "attention_mask"), tmp_path, rows, Packing() if packed else None, finish)
    assert sum(isinstance(module, FusedBranch) for module in model.modules()) == 4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    slot = np.array([2, 1])
    feeds = {"input_ids": IDS.numpy(), "attention_mask": MASK.numpy(), TABLE: table.numpy(), SLOT: slot}
    if packed:
        feeds[TOKEN_INDEX] = kept_tokens(MASK.numpy())
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, **FP32_SIDE_BRANCH)
    count = operators(tmp_path)
    (tmp_path / "merged").mkdir()
    _, merged = load(name, tmp_path / "again")
    write_graph(merged, ("input_ids", "attention_mask"), tmp_path / "merged", None, Packing() if packed else None)
    fewer = operators(tmp_path / "merged")
    more = {kind: count[kind] - fewer.get(kind, 0) for kind in count if count[kind] != fewer.get(kind, 0)}
    # For both blocks together: one product, one scaling and one Concat each, and no sum.
    assert more.pop("MatMul") == more.pop("Mul") == 2 and "Add" not in more
    # The rest is said once: a slot is guarded and its row gathered, and packed spread over its tokens.
    assert more.pop("Split") == 1 and more.pop("Gather") == (3 if packed else 1)
    assert sum(more.values()) <= (12 if packed else 6), more


def operators(folder: Path) -> dict[str, int]:
    kinds = [node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node]
    return {kind: kinds.count(kind) for kind in set(kinds)}


def test_branches_are_joined_where_a_gpu_is_meant() -> None:
    assert fuses("fp16", "cpu") and fuses("bf16", "cuda") and fuses("fp32", "cuda")
    assert not fuses("fp32", "cpu") and not fuses("int8", "cpu")


@pytest.mark.parametrize(
    ("parts", "runs"),
    [
        ((160,) * 24, [(0, 24)]),
        ((4096, 8), [(0, 1), (1, 2)]),
        ((5000, 8, 8), [(0, 1), (1, 3)]),
        ((8, 5000, 8), [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_columns_spread_over_tokens_at_once_are_bounded(parts: tuple[int, ...], runs: list[tuple[int, int]]) -> None:
    assert _runs(parts) == runs
