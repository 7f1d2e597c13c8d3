"""A decoder's customer beside PyTorch: merged, sharded, unmerged, as a LoRA folder, and in a model that was loaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import qrlora_deploy as qr
from exporters.peft.lora_folder import export_peft
from qrlora_deploy.errors import InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.io.files import digest_file
from qrlora_deploy.models.adapter import attach, set_coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from tests.tiny_decoder import save_decoder
from tests.tolerances import FP32_SIDE_BRANCH

IDS = torch.tensor([[3, 40, 5, 60, 7, 200, 9, 11]])


@pytest.fixture(scope="module", params=["Llama", "Qwen2", "GPT2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder") / "base"
    own = (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48} if request.param == "GPT2" else {}
    )
    return save_decoder(folder, request.param, **own, tie_word_embeddings=request.param != "Qwen2")


@pytest.fixture(scope="module")
def basis(base: Path) -> Basis:
    return qr.factorize(base)


@pytest.fixture(scope="module")
def customer(base: Path, basis: Basis) -> Coefficients:
    values = np.random.default_rng(1).normal(0, 0.3, basis.total_rank).astype(np.float32)
    return Coefficients(
        values=values,
        base_name=str(base),
        task="text-generation",
        labels=(),
        head={},
        basis_file="",
        training={},
        basis_digest=basis.digest,
        base_digest=open_checkpoint(str(base)).digest,
    )


@pytest.fixture(scope="module")
def expected(base: Path, basis: Basis, customer: Coefficients) -> torch.Tensor:
    """Logits with side branches in a model of transformers' own loading."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before = logits(model)
    set_coefficients(attach(model, basis), basis, customer.values)
    found = logits(model)
    assert (found - before).abs().max() > 1.0
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def test_a_merged_checkpoint_answers_as_the_attached_model(
    base: Path, basis: Basis, customer: Coefficients, expected: torch.Tensor, tmp_path: Path
) -> None:
    qr.merge(base, basis, customer, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(model), expected, **FP32_SIDE_BRANCH)
    for name in ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert digest_json(tmp_path / "merged" / name) == digest_json(base / name), name
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "AutoModelForCausalLM.from_pretrained" in card
    restored = qr.unmerge(tmp_path / "merged", basis, customer, tmp_path / "restored")
    assert restored.max_deviation < 1e-6
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "restored", dtype=torch.float32).eval())
    plain = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval())
    torch.testing.assert_close(found, plain, **FP32_SIDE_BRANCH)


def digest_json(path: Path) -> str:
    return json.dumps(json.loads(path.read_text()), sort_keys=True) if path.suffix == ".json" else digest_file(path)


def test_a_base_in_shards_has_the_basis_and_the_shards_of_its_own(
    base: Path, basis: Basis, customer: Coefficients, expected: torch.Tensor, tmp_path: Path
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="40kB")
    for file in base.glob("*token*"):
        (tmp_path / "sharded" / file.name).write_bytes(file.read_bytes())
    shards = sorted(file.name for file in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    again = qr.factorize(tmp_path / "sharded")
    assert again.digest == basis.digest
    assert open_checkpoint(str(tmp_path / "sharded")).digest == customer.base_digest
    qr.merge(tmp_path / "sharded", basis, customer, tmp_path / "merged")
    assert sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors")) == shards
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(model), expected, **FP32_SIDE_BRANCH)


def test_a_lora_folder_answers_the_same_in_peft(
    base: Path, basis: Basis, customer: Coefficients, expected: torch.Tensor, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    export_peft(ExportJob(open_checkpoint(str(base)), basis, tmp_path / "lora", customer))
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    torch.testing.assert_close(logits(model), expected, **FP32_SIDE_BRANCH)


def test_a_model_in_memory_gets_a_customer_and_loses_it(
    base: Path, basis: Basis, customer: Coefficients, expected: torch.Tensor
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before = logits(model)
    qr.load_customer(model, basis, customer)
    torch.testing.assert_close(logits(model), expected, **FP32_SIDE_BRANCH)
    qr.remove_customer(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_own_training_loops_end_in_a_customer(base: Path, basis: Basis) -> None:
    model = qr.attach(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), basis)
    trained: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found = qr.coefficients_of(model, base=base)
    assert losses[-1] < losses[0] and found.task == "text-generation" and found.labels == () and found.values.all()


def test_first_letters_mean_projections(base: Path, basis: Basis) -> None:
    if any(name.endswith("c_attn") for name in basis.names):
        with pytest.raises(InputError, match="no layer is called q, v; there are attn.c_attn"):  # the three in one
            qr.factorize(base, targets=["q", "v"])
    else:
        names = qr.factorize(base, targets=["q", "v"]).names
        assert names == [name for name in basis.names if name.endswith(("q_proj", "v_proj"))] and len(names) == 4
