"""LoRA folders that PEFT wrote and tuned checkpoints, as customers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import qrlora_deploy as qr
from qrlora_deploy.errors import BasisMismatchError, FileFormatError, InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.merging.checkpoints import merge
from qrlora_deploy.models.checkpoint import open_checkpoint
from tests.tiny import SENTENCES, save_base
from tests.tolerances import FP32_SIDE_BRANCH


def save_lora(base: Path, folder: Path, **config: Any) -> Path:
    """A LoRA of random factors, by PEFT."""
    model = open_checkpoint(str(base)).load_model()
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    tuned = get_peft_model(model, LoraConfig(**(options | config)))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    tuned.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    """On one text, without an attention mask of interest."""
    ids = torch.tensor([[2, 7, 20, 31, 3]])
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.fixture(scope="module")
def whole_basis(tiny_base: Path) -> Basis:
    """All directions of query and value."""
    return qr.factorize(tiny_base, tau=1.0, targets=("query", "value"))


def test_a_customer_that_went_to_peft_comes_back(
    tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path
) -> None:
    qr.export(tiny_base, tiny_basis, tmp_path / "lora", coefficients=tiny_customer, format="peft")
    made = qr.project(tmp_path / "lora", tiny_base, tiny_basis)
    np.testing.assert_allclose(made.customer.values, tiny_customer.values, rtol=1e-4, atol=1e-6)
    assert made.share == pytest.approx(1) and not made.left_out
    assert made.customer.labels == tiny_customer.labels and not made.customer.head
    assert made.customer.training["projected"]["kind"] == "lora"


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"rank_pattern": {"value": 2}, "alpha_pattern": {"layer.1.*query": 3}}]
)
def test_shares_are_those_of_the_updates_that_peft_merges(
    changes: dict[str, Any], tiny_base: Path, tiny_basis: Basis, tmp_path: Path
) -> None:
    from peft import PeftModel

    lora = save_lora(tiny_base, tmp_path / "lora", target_modules=["query", "value", "key"], **changes)
    made = qr.project(lora, tiny_base, tiny_basis)
    model = open_checkpoint(str(tiny_base)).load_model()
    before = {name: value.clone().double() for name, value in model.state_dict().items()}
    after = PeftModel.from_pretrained(model, lora).merge_and_unload().state_dict()
    adapted = [name for name in before if name.endswith(("query.weight", "value.weight", "key.weight"))]
    deltas = {name: after[name].double() - before[name] for name in adapted}
    whole = sum(float(delta.square().sum()) for delta in deltas.values())
    parts = tiny_basis.split(made.customer.values)
    left = {name.removesuffix(".weight"): delta for name, delta in deltas.items()}
    for target in tiny_basis.targets:
        c = parts[target.name].astype(np.float64)
        held = (target.q.astype(np.float64) * c) @ target.r.astype(np.float64)
        left[target.name] = left[target.name] - torch.from_numpy(held)
    lost = sum(float(delta.square().sum()) for delta in left.values())
    assert 0.001 < made.share < 0.9
    assert made.share == pytest.approx(1 - lost / whole, abs=1e-5)
    assert len(made.left_out) == 2 and all("key" in name for name in made.left_out)


def test_a_tuned_checkpoint_becomes_a_customer_with_its_head(
    tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    merge(checkpoint, tiny_basis, tiny_customer, tmp_path / "merged")
    model = open_checkpoint(str(tmp_path / "merged")).load_model()
    with torch.no_grad():
        model.classifier.weight.add_(0.5)
        model.bert.embeddings.LayerNorm.bias.add_(1e-4)
    model.config.id2label = {index: f"kind {index}" for index in range(4)}
    model.save_pretrained(tmp_path / "tuned")
    made = qr.project(tmp_path / "tuned", tiny_base, tiny_basis)
    np.testing.assert_allclose(made.customer.values, tiny_customer.values, rtol=1e-4, atol=1e-5)
    assert list(made.left_out) == ["bert.embeddings.LayerNorm.bias"] and 0.99 < made.share < 1
    assert made.customer.labels == ("kind 0", "kind 1", "kind 2", "kind 3")
    again = checkpoint.load_model()
    qr.load_customer(again, tiny_basis, made.customer)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-3, atol=1e-2)


def test_a_head_of_other_labels_comes_along(tiny_base: Path, whole_basis: Basis, tmp_path: Path) -> None:
    other = save_base(tmp_path / "three", labels=("a", "b", "c"))
    made = qr.project(other, tiny_base, whole_basis)
    assert made.customer.labels == ("a", "b", "c")
    assert {name: values.shape for name, values in made.customer.head.items()} == {
        "classifier.weight": (3, 32),
        "classifier.bias": (3,),
    }


def test_training_goes_on_from_a_projected_customer(tiny_base: Path, whole_basis: Basis, tmp_path: Path) -> None:
    lora = save_lora(tiny_base, tmp_path / "lora")
    made = qr.project(lora, tiny_base, whole_basis)
    rows = tmp_path / "rows.tsv"
    rows.write_text("text\tlabel\n" + "".join(f"{text}\ttravel\n" for text in SENTENCES), encoding="utf-8")
    tiny_rate = 1e-12
    kept = qr.train(tiny_base, whole_basis, rows, start=made.customer, epochs=1, max_length=32, learning_rate=tiny_rate)
    np.testing.assert_allclose(kept.values, made.customer.values, **FP32_SIDE_BRANCH)
    assert kept.training["start_digest"] == made.customer.digest
    trained = qr.train(tiny_base, whole_basis, rows, start=made.customer, epochs=1, max_length=32, learning_rate=0.05)
    assert np.abs(trained.values - made.customer.values).max() > 1e-3
    wrong = qr.factorize(tiny_base, tau=0.3, targets=("query", "value"))
    with pytest.raises(BasisMismatchError, match="start: the coefficients were trained on basis"):
        qr.train(tiny_base, wrong, rows, start=made.customer, epochs=1, max_length=32)


def edit(folder: Path, **changes: Any) -> None:
    """Other entries in the config of a LoRA."""
    place = folder / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"peft_type": "IA3"}, "adapter of kind IA3; only LoRA"),
        ({"use_dora": True}, "uses DoRA"),
        ({"bias": "all"}, "trained biases too"),
        ({"r": "many"}, "is no config of a LoRA"),
        ({"r": 5}, "has rank 4, the config says 5"),
        ({"alpha_pattern": {"(": 3}}, "is none"),
        ({"lora_alpha": float("nan")}, "is no config of a LoRA: lora_alpha"),
        ({"lora_alpha": 1e308}, "is no config of a LoRA: lora_alpha"),
        ({"alpha_pattern": {"query": float("inf")}}, "is no config of a LoRA: alpha_pattern"),
    ],
)
def test_other_adapters_are_refused_in_one_line(
    changes: dict[str, Any], line: str, tiny_base: Path, tiny_basis: Basis, tmp_path: Path
) -> None:
    lora = save_lora(tiny_base, tmp_path / "lora")
    edit(lora, **changes)
    with pytest.raises(InputError, match=line) as caught:
        qr.project(lora, tiny_base, tiny_basis)
    assert "\n" not in str(caught.value)


def test_damaged_and_foreign_folders_are_refused(tiny_base: Path, tiny_basis: Basis, tmp_path: Path) -> None:
    lora = save_lora(tiny_base, tmp_path / "lora")
    weights = lora / "adapter_model.safetensors"
    tensors = load_file(weights)
    cut = weights.read_bytes()[:-7]
    weights.write_bytes(cut)
    with pytest.raises(FileFormatError, match="is damaged"):
        qr.project(lora, tiny_base, tiny_basis)
    name = next(name for name in tensors if "lora_A" in name)
    for changed, line in (
        ({key: value for key, value in tensors.items() if key != name}, "incomplete"),
        (
            tensors | {"base_model.model.bert.pooler.dense.weight": torch.zeros(32, 32)},
            "trained bert.pooler.dense.w",
        ),
        (tensors | {"base_model.model.x.lora_embedding_A": torch.zeros(4, 9)}, "no LoRA of a linear layer"),
        ({key.replace("layer.0", "layer.7"): value for key, value in tensors.items()}, "has no layer"),
        (tensors | {name: torch.full_like(tensors[name], torch.nan)}, r"lora changes .* by NaN or Inf"),
        (tensors | {name: tensors[name].int()}, "are no floating-point numbers"),
    ):
        save_file(changed, weights)
        with pytest.raises(InputError, match=line):
            qr.project(lora, tiny_base, tiny_basis)
    # What the basis has no target for would make the share no number.
    keys_alone = qr.factorize(tiny_base, rank=1, targets=("key",))
    save_file(tensors | {name: torch.full_like(tensors[name], torch.inf)}, weights)
    with pytest.raises(InputError, match="by NaN or Inf"):
        qr.project(lora, tiny_base, keys_alone)
    weights.unlink()
    (lora / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="is a pickle, which is not read"):
        qr.project(lora, tiny_base, tiny_basis)
    (lora / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"is not a checkpoint: it holds no config\.json"):
        qr.project(lora, tiny_base, tiny_basis)


def test_an_own_head_needs_names(tiny_base: Path, tiny_basis: Basis, tmp_path: Path) -> None:
    lora = save_lora(tiny_base, tmp_path / "lora")
    weights = lora / "adapter_model.safetensors"
    head = {"base_model.model.classifier.weight": torch.ones(2, 32), "base_model.model.classifier.bias": torch.ones(2)}
    save_file({name: value for name, value in load_file(weights).items() if "lora_" in name} | head, weights)
    with pytest.raises(InputError, match="answers with 2 outputs; name them by labels"):
        qr.project(lora, tiny_base, tiny_basis)
    with pytest.raises(InputError, match="labels must be a list of names"):
        qr.project(lora, tiny_base, tiny_basis, labels="ny")
    made = qr.project(lora, tiny_base, tiny_basis, labels=("no", "yes"))
    assert made.customer.labels == ("no", "yes") and made.customer.head["classifier.weight"].shape == (2, 32)
