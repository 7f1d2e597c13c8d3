"""Switchable graphs against PyTorch: different customers in the rows of a batch, heads of their own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from exporters.onnx import export as export_module
from exporters.onnx import export_switchable, verify_against
from exporters.onnx.options import OnnxOptions
from exporters.onnx.synthetic_customers import base_customer
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import BasisMismatchError, CheckFailed, InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.runtime import open_bundle, verify
from qrlora_deploy.runtime.verification.parity import read_reference
from tests.tiny import build_tokenizer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENCODERS = {
    "bert": (BertForSequenceClassification, BertConfig, SMALL),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, SMALL),
    "mpnet": (MPNetForSequenceClassification, MPNetConfig, SMALL),
    "distilbert": (
        DistilBertForSequenceClassification,
        DistilBertConfig,
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    ),
    "deberta-v2": (
        DebertaV2ForSequenceClassification,
        DebertaV2Config,
        SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
}


def save_encoder(name: str, folder: Path, scale: float = 0.2, **changes: int) -> Path:
    model_class, config_class, sizes = ENCODERS[name]
    tokenizer = build_tokenizer()
    config = config_class(
        vocab_size=len(tokenizer),
        max_position_embeddings=70,
        num_labels=4,
        pad_token_id=tokenizer.pad_token_id,
        **sizes | changes,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name", ["bert", "mpnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("roberta", "distilbert"))]
)
def test_every_encoder_agrees_with_pytorch_on_all_linear_layers(name: str, tmp_path: Path, texts: Examples) -> None:
    checkpoint = open_checkpoint(str(save_encoder(name, tmp_path / "base")))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton()), EnergyShare(0.5))
    manifest = export_switchable(
        ExportJob(checkpoint, basis, tmp_path / "bundle"), OnnxOptions(data=texts, head_labels=6)
    )
    assert manifest.parity.max_abs_error <= manifest.parity.bound < manifest.customer_effect / 10
    assert len(manifest.targets) >= 12
    assert verify(open_bundle(tmp_path / "bundle")).passed


def test_as_many_targets_as_a_deep_model_has(tmp_path: Path, texts: Examples) -> None:
    """ONNX Runtime reads the sizes of the targets' Split while it loads the graph, so they must be in it."""
    checkpoint = open_checkpoint(str(save_encoder("bert", tmp_path / "base", num_hidden_layers=7)))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton()), FixedRank(2))
    manifest = export_switchable(ExportJob(checkpoint, basis, tmp_path / "bundle"), OnnxOptions(data=texts))
    assert len(manifest.targets) == 42 and manifest.parity.max_abs_error <= manifest.parity.bound


def test_deberta_works_but_for_projections_of_positions(tmp_path: Path, texts: Examples) -> None:
    checkpoint = open_checkpoint(str(save_encoder("deberta-v2", tmp_path / "base")))
    skeleton = checkpoint.skeleton()
    everything = factorize(checkpoint, choose_targets(skeleton, [r".*_proj"]), EnergyShare(0.5))
    # Positions have no rows of a batch, so no customers either; unasked they are left out.
    with pytest.raises(InputError, match=r"pos_\w+_proj takes an input of shape \[1, \d+, 32\]"):
        export_switchable(ExportJob(checkpoint, everything, tmp_path / "bundle"), OnnxOptions(data=texts))
    assert not (tmp_path / "bundle").exists()
    basis = factorize(checkpoint, choose_targets(skeleton), EnergyShare(0.5))
    manifest = export_switchable(ExportJob(checkpoint, basis, tmp_path / "bundle"), OnnxOptions(data=texts))
    assert manifest.parity.max_abs_error <= manifest.parity.bound < manifest.customer_effect / 10


def test_graph_has_the_inputs_of_the_contract(switchable: Path, tiny_basis: Basis) -> None:
    model = onnx.load(switchable / "model.onnx", load_external_data=False)
    width = sum(-(-rank // 8) * 8 for rank in tiny_basis.ranks.values())
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert shapes.pop("coefficient_table") == ["slots", width]
    assert shapes.pop("head_table") == ["slots", 6 * 33]
    assert shapes.pop("slot") == ["batch"]
    assert all(shape == ["batch", "sequence"] for shape in shapes.values())
    assert sum(node.op_type == "Attention" for node in model.graph.node) == 2


def test_cases_mix_customers_and_the_base_in_neighbouring_rows(switchable: Path) -> None:
    cases = read_reference(switchable / "reference.safetensors")
    for case in cases:
        slot = case.inputs["slot"]
        assert (np.diff(slot) != 0).all()
        base_rows = slot == 0
        np.testing.assert_array_equal(case.logits[base_rows], case.base_logits[base_rows])
        assert not np.array_equal(case.logits[~base_rows], case.base_logits[~base_rows])
        tables = case.inputs["coefficient_table"]
        assert not tables[0].any() and all(row.any() for row in tables[1:])
    assert {0, 1, 2, 3} == set(np.concatenate([case.inputs["slot"] for case in cases]))


def test_customers_with_fewer_labels_are_masked(switchable: Path) -> None:
    for case in read_reference(switchable / "reference.safetensors"):
        labels = np.isfinite(case.logits).sum(axis=1)
        # The base has four labels, the made-up customers six, three and the base's.
        assert [{0: 4, 1: 6, 2: 3, 3: 4}[slot] for slot in case.inputs["slot"]] == list(labels)


def test_a_graph_that_ignores_the_slot_is_caught(
    tiny_base: Path, tiny_basis: Basis, texts: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = export_module.make_switchable

    def wrong(*arguments: object) -> object:
        rows = make(*arguments)  # type: ignore[arg-type]
        fill = rows.fill
        rows.fill = lambda inputs: fill(inputs | {"slot": inputs["slot"] * 0 + 1})  # type: ignore[method-assign]
        return rows

    monkeypatch.setattr(export_module, "make_switchable", wrong)
    with pytest.raises(CheckFailed, match="logits differ from PyTorch"):
        export_switchable(
            ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "bundle"), OnnxOptions(data=texts)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("slot", [-1, -3, -(2**31), -(2**63), 3, 2**31 - 1, 2**62])
def test_a_slot_without_a_row_is_an_error_in_the_bare_graph(slot: int, switchable: Path) -> None:
    """Whoever runs the graph by himself: ONNX's Gather takes -1 for the last row, which is a customer's."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(switchable / "model.onnx", options, providers=["CPUExecutionProvider"])
    case = read_reference(switchable / "reference.safetensors")[1]
    tables = {name: array[1:4] for name, array in case.inputs.items() if name.endswith("_table")}
    text = {name: array for name, array in case.inputs.items() if array.ndim == 2 and name not in tables}
    rows = len(case.logits)
    session.run(None, text | tables | {"slot": np.arange(rows) % 3})
    with pytest.raises(Exception, match="out of data bounds"):
        session.run(None, text | tables | {"slot": np.array([0] * (rows - 1) + [slot], dtype=np.int64)})


def test_customers_that_move_nothing_are_named_and_not_refused(tmp_path: Path, texts: Examples) -> None:
    checkpoint = open_checkpoint(str(save_encoder("bert", tmp_path / "base", scale=1e-3)))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton(), ("query",)), EnergyShare(0.5))
    manifest = export_switchable(ExportJob(checkpoint, basis, tmp_path / "bundle"), OnnxOptions(data=texts))
    assert manifest.parity.not_shown == ("customers",) and manifest.parity.effect_correlation is None
    bundle = open_bundle(tmp_path / "bundle")
    assert verify(bundle).passed
    customer = base_customer(checkpoint, basis)
    with pytest.raises(CheckFailed, match="does not move the logits on these texts"):
        verify_against(bundle, checkpoint, basis, customer, texts)


def test_another_base_is_refused(tiny_basis: Basis, texts: Examples, tmp_path: Path) -> None:
    other = open_checkpoint(str(save_encoder("bert", tmp_path / "other")))
    with pytest.raises((BasisMismatchError, InputError)):
        export_switchable(ExportJob(other, tiny_basis, tmp_path / "bundle"), OnnxOptions(data=texts))
    assert not (tmp_path / "bundle").exists()


def test_room_for_fewer_labels_than_the_base_is_refused(
    tiny_base: Path, tiny_basis: Basis, texts: Examples, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="head_labels=3"):
        export_switchable(
            ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "bundle"),
            OnnxOptions(data=texts, head_labels=3),
        )


def test_verify_against_takes_any_customer_of_the_basis(
    switchable: Path, tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, texts: Examples
) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    bundle = open_bundle(switchable)
    for customer in (tiny_customer, replace(tiny_customer, values=-tiny_customer.values)):
        assert verify_against(bundle, checkpoint, tiny_basis, customer, texts).passed
