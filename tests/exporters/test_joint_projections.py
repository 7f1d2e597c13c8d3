"""One product for query, key and value: fewer operators, and the logits of PyTorch."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from exporters.onnx.branch_fusion import fuse_branches
from exporters.onnx.graph import write_graph
from exporters.onnx.joint_projections import join_projections
from exporters.onnx.varlen import OPERATOR, VarlenPacking
from qrlora_deploy.runtime import open_session
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE
from qrlora_deploy.runtime.sessions.packed_tokens import packed_arrays
from qrlora_deploy.runtime.sessions.token_index import TOKEN_INDEX, kept_tokens
from tests.exporters.test_bias_folding import IDS, load
from tests.exporters.test_branch_fusion import switchable
from tests.exporters.test_varlen import PackedAttention
from tests.tolerances import FP32_ONNX, FP32_SIDE_BRANCH

NAMES = ("input_ids", "attention_mask")
MASK = (torch.arange(IDS.shape[1]) < torch.tensor([[IDS.shape[1] - 2], [IDS.shape[1]]])).long()


def packed_answer(folder: Path, further: dict[str, np.ndarray]) -> np.ndarray:
    graph = onnx.load(folder / "packed.onnx", load_external_data=False).graph
    taken = [value.name for value in graph.input if value.name not in further]
    inputs = {"input_ids": IDS.numpy(), "attention_mask": MASK.numpy()}
    feeds = packed_arrays(inputs, taken, len(IDS) + 1, IDS.shape[1], int(MASK.sum()) + 2)
    found = ReferenceEvaluator(str(folder / "packed.onnx"), new_ops=[PackedAttention]).run(None, feeds | further)[0]
    return np.asarray(found[: len(IDS)])


def standard_answer(folder: Path, further: dict[str, np.ndarray]) -> np.ndarray:
    mask = MASK.numpy()
    feeds = {"input_ids": IDS.numpy(), "attention_mask": mask, TOKEN_INDEX: kept_tokens(mask)} | further
    return np.asarray(open_session(folder / "model.onnx", threads=1).run(None, feeds)[0])


def operators(folder: Path, kind: str) -> int:
    graph = onnx.load(folder / "packed.onnx", load_external_data=False).graph
    return sum(node.op_type == kind for node in graph.node)


@pytest.mark.parametrize("name", ["mpnet", pytest.param("roberta", marks=pytest.mark.slow)])
def test_a_merged_model_has_one_product_for_a_block_and_answers_as_in_pytorch(name: str, tmp_path: Path) -> None:
    _checkpoint, model = load(name, tmp_path)
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=MASK).logits.numpy()
    packing = VarlenPacking(required=True, joint=True)
    blocks = model.config.num_hidden_layers

    def finish() -> None:
        assert join_projections(model, packing) == blocks

    write_graph(model, NAMES, tmp_path, packing=packing, finish=finish)
    np.testing.assert_allclose(packed_answer(tmp_path, {}), expected, **FP32_ONNX)
    np.testing.assert_allclose(standard_answer(tmp_path, {}), expected, **FP32_ONNX)
    # The joint one, the output layer, and two of the feed-forward part; no sum with a bias before attention.
    assert operators(tmp_path, "MatMul") == 4 * blocks and operators(tmp_path, OPERATOR) == blocks
    assert not operators(tmp_path, "Split")


def test_branches_lie_in_the_joint_product(tmp_path: Path) -> None:
    model, rows, table = switchable("mpnet", ("q", "v"), tmp_path)
    with torch.no_grad():
        rows.fill({TABLE: table, SLOT: torch.tensor([2, 1])})
        expected = model(input_ids=IDS, attention_mask=MASK).logits.numpy()
        rows.fill({TABLE: table * 0, SLOT: torch.tensor([2, 1])})
        base = model(input_ids=IDS, attention_mask=MASK).logits.numpy()
    packing = VarlenPacking(required=True, joint=True)

    def finish() -> None:
        fuse_branches(model, rows)
        join_projections(model, packing)

    write_graph(model, NAMES, tmp_path, rows, packing, finish)
    further = {TABLE: table.numpy(), SLOT: np.array([2, 1, 0])}
    assert np.abs(expected - base).max() > 0.01, "the customers have no effect"
    np.testing.assert_allclose(packed_answer(tmp_path, further), expected, **FP32_SIDE_BRANCH)
    np.testing.assert_allclose(
        standard_answer(tmp_path, {**further, SLOT: further[SLOT][:2]}), expected, **FP32_SIDE_BRANCH
    )
    # The input of the joint product: a product, the scaling, the join.
    assert operators(tmp_path, "Concat") - 1 == operators(tmp_path, "Mul") == model.config.num_hidden_layers


def test_attention_that_cannot_be_packed_keeps_three_products() -> None:
    packing = VarlenPacking(joint=True)
    packing.obstacle = "its scores have a soft cap"
    model = torch.nn.Module()
    assert join_projections(model, packing) == 0 and not packing.joint
