"""An export reads its base once: one model, one tokenizer, one hash of each tensor; the lent model comes back whole."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from exporters.onnx import export_merged, export_switchable
from exporters.onnx.options import OnnxOptions
from exporters.onnx.prepared import prepare
from exporters.onnx.reference import reference_batches
from exporters.onnx.side_branches import model_logits, side_branches
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.head import output_layer
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.models.weight_files import StoredTensor
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from tests.exporters.test_switchable import save_encoder
from tests.tiny import LABELS, SENTENCES

LABELLED = Examples(list(SENTENCES), None, [LABELS[row % 4] for row in range(len(SENTENCES))], "labelled")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a model and a tokenizer were loaded, and each stored tensor was hashed."""
    counts: Counter[str] = Counter()
    load, tokenize, digest = (
        PreTrainedModel.from_pretrained.__func__,
        AutoTokenizer.from_pretrained,
        StoredTensor.digest,
    )

    def load_counted(cls: Any, *arguments: Any, **named: Any) -> Any:
        counts["model"] += 1
        return load(cls, *arguments, **named)

    def tokenize_counted(*arguments: Any, **named: Any) -> Any:
        counts["tokenizer"] += 1
        return tokenize(*arguments, **named)

    def digest_counted(tensor: StoredTensor) -> str:
        counts[f"hash {tensor.start}"] += 1
        return digest(tensor)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load_counted))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenize_counted)
    monkeypatch.setattr(StoredTensor, "digest", digest_counted)
    return counts


@pytest.mark.parametrize("kind", ["merged", "switchable"])
def test_everything_is_read_once(
    kind: str, reads: Counter[str], tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path
) -> None:
    """With labels of its own on the data, so that accuracy is measured, too."""
    checkpoint = open_checkpoint(str(tiny_base))
    if kind == "merged":
        assert checkpoint.digest == tiny_customer.base_digest  # as the command makes sure first
        manifest = export_merged(
            ExportJob(checkpoint, tiny_basis, tmp_path / "bundle", tiny_customer), OnnxOptions(data=LABELLED)
        )
    else:
        options = OnnxOptions(data=LABELLED, head_labels=6)
        manifest = export_switchable(ExportJob(checkpoint, tiny_basis, tmp_path / "bundle"), options)
    assert manifest.parity.accuracy_rows == len(SENTENCES)
    hashes = {name: count for name, count in reads.items() if name.startswith("hash")}
    assert len(hashes) == len(checkpoint.stored) and set(hashes.values()) == {1}
    assert (reads["model"], reads["tokenizer"]) == (1, 1)


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_the_lent_model_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_encoder(name, tmp_path / "base")))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton()), EnergyShare(0.5))
    prepared = prepare(checkpoint, None)
    model = prepared.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [(path, type(module)) for path, module in model.named_modules()]
    trainable = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    attention, outputs = model.config._attn_implementation, model.num_labels
    inputs = reference_batches(prepared)["left padding"]
    answer = model_logits(model, inputs)

    values = np.random.default_rng(3).uniform(0.5, 1.5, basis.total_rank).astype(np.float32)
    customer = Coefficients(
        values, basis.digest, checkpoint.name, checkpoint.digest, checkpoint.task, checkpoint.labels
    )
    layer = output_layer(model)
    features = model.get_submodule(layer).in_features
    head = {f"{layer}.weight": np.ones((7, features), np.float32), f"{layer}.bias": np.ones(7, np.float32)}
    own = replace(customer, head=head, labels=tuple(f"label {index}" for index in range(7)))
    with pytest.raises(KeyboardInterrupt), side_branches(prepared, basis) as side:
        mine, base = side.answers(own, inputs)
        assert mine.shape == (len(answer), 7) and np.abs(mine - base).max() > 1e-3
        raise KeyboardInterrupt

    assert [(path, type(module)) for path, module in model.named_modules()] == kinds
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert {path for path, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert (model.config._attn_implementation, model.num_labels) == (attention, outputs)
    np.testing.assert_array_equal(model_logits(model, inputs), answer)
