"""Customers as adapters of PEFT: from a folder, several at once, mixed in a batch, against our own side branch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

import qrlora_deploy as qr
from qrlora_deploy.errors import BasisMismatchError, InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from tests.tiny import LABELS, build_tokenizer
from tests.tolerances import FP32_SIDE_BRANCH

peft = pytest.importorskip("peft", reason="needs peft, which the extra `test` brings")

from qrlora_deploy.integrations.peft import QRLoRAConfig, register, write_adapter  # noqa: E402 - it needs peft

TOKENS = torch.tensor([[5, 9, 2, 7, 11, 3], [8, 4, 6, 1, 0, 0], [3, 3, 9, 1, 4, 0]])
INPUTS = {"input_ids": TOKENS, "attention_mask": (TOKENS != 0).long()}


@pytest.fixture(autouse=True)
def registered() -> None:
    register()
    register()  # again does nothing


@pytest.fixture
def basis(tiny_basis: Basis, tmp_path: Path) -> Basis:
    own = replace(tiny_basis, file=None)
    own.save(tmp_path / "basis.safetensors")
    return own


@pytest.fixture
def customers(tiny_customer: Coefficients) -> dict[str, Coefficients]:
    """Three customers of the base's own head."""
    rolled = np.roll(tiny_customer.values, 3)
    return {"acme": tiny_customer, "rolled": replace(tiny_customer, values=rolled.copy())} | {
        "less": replace(tiny_customer, values=tiny_customer.values * np.float32(0.25))
    }


@pytest.fixture
def adapters(tiny_base: Path, basis: Basis, customers: dict[str, Coefficients], tmp_path: Path) -> Path:
    for name, customer in customers.items():
        write_adapter(tiny_base, basis, customer, tmp_path / "adapters" / name)
    return tmp_path / "adapters"


def load_base(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def open_all(base: Path, adapters: Path, *names: str) -> Any:
    first, *others = names
    model = peft.PeftModel.from_pretrained(load_base(base), adapters / first, adapter_name=first)
    for name in others:
        model.load_adapter(adapters / name, adapter_name=name)
    return model.eval()


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS, **options).logits


def expected(base: Path, basis: Basis, customer: Coefficients) -> torch.Tensor:
    return logits(qr.load_customer(load_base(base), basis, customer))


def test_peft_opens_a_customer_and_answers_as_our_side_branch(
    tiny_base: Path, basis: Basis, customers: dict[str, Coefficients], adapters: Path
) -> None:
    model = open_all(tiny_base, adapters, "acme")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logits(model), expected(tiny_base, basis, customers["acme"]), **FP32_SIDE_BRANCH)
    plain = logits(load_base(tiny_base))
    assert (logits(model) - plain).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


def test_a_folder_takes_kilobytes_and_names_its_basis_as_seen_from_itself(
    basis: Basis, adapters: Path, customers: dict[str, Coefficients], tmp_path: Path, tiny_base: Path
) -> None:
    config = json.loads((adapters / "acme" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["basis_file"]) == ("QRLORA", "../../basis.safetensors")
    assert config["labels"] == list(LABELS)
    stored = load_file(adapters / "acme" / "adapter_model.safetensors")
    values = np.concatenate([stored[f"base_model.model.{name}.qrlora_c"] for name in basis.names])
    np.testing.assert_array_equal(values, customers["acme"].values)
    assert len(stored) == len(basis.names)
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere"
    (tmp_path / "basis.safetensors").rename(moved / "basis.safetensors")
    adapters.rename(moved / "adapters")
    open_all(tiny_base, moved / "adapters", "acme")


def test_several_adapters_share_the_factors_and_take_turns(
    tiny_base: Path, basis: Basis, customers: dict[str, Coefficients], adapters: Path
) -> None:
    model = open_all(tiny_base, adapters, *customers)
    factors = [buffer for name, buffer in model.named_buffers() if "qrlora_" in name]
    assert len(factors) == 2 * len(basis.names)
    for name in (*customers, "acme"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected(tiny_base, basis, customers[name]), **FP32_SIDE_BRANCH)
    model.delete_adapter("acme")
    model.set_adapter("less")
    torch.testing.assert_close(logits(model), expected(tiny_base, basis, customers["less"]), **FP32_SIDE_BRANCH)


def test_a_batch_may_mix_customers(
    tiny_base: Path, basis: Basis, customers: dict[str, Coefficients], adapters: Path
) -> None:
    model = open_all(tiny_base, adapters, *customers)
    found = logits(model, adapter_names=["less", "__base__", "acme"])
    alone = {name: expected(tiny_base, basis, customer) for name, customer in customers.items()}
    alone["__base__"] = logits(load_base(tiny_base))
    for row, name in enumerate(("less", "__base__", "acme")):
        torch.testing.assert_close(found[row], alone[name][row], **FP32_SIDE_BRANCH)
    # The hooks of the mixed batch are gone again.
    torch.testing.assert_close(logits(model), alone["acme"], **FP32_SIDE_BRANCH)
    with pytest.raises(ValueError, match="no adapter nobody"):
        logits(model, adapter_names=["nobody", "acme", "acme"])
    with pytest.raises(ValueError, match="2 names for 3 rows"):
        logits(model, adapter_names=["acme", "acme"])
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        logits(model.train(), adapter_names=["acme"] * 3)


def test_heads_of_their_own_are_mixed_too(
    tiny_base: Path, basis: Basis, tiny_customer: Coefficients, tmp_path: Path
) -> None:
    random = np.random.default_rng(3)
    shapes = {"classifier.weight": (4, 32), "classifier.bias": (4,)}
    headed = {}
    for name in ("one", "two"):
        head = {part: random.normal(size=shape).astype(np.float32) for part, shape in shapes.items()}
        headed[name] = replace(tiny_customer, head=head, labels=("a", "b", "c", "d"))
        write_adapter(tiny_base, basis, headed[name], tmp_path / name)
    model = open_all(tiny_base, tmp_path, "one", "two")
    alone = {name: expected(tiny_base, basis, customer) for name, customer in headed.items()}
    found = logits(model, adapter_names=["two", "one", "two"])
    for row, name in enumerate(("two", "one", "two")):
        torch.testing.assert_close(found[row], alone[name][row], **FP32_SIDE_BRANCH)
    model.set_adapter("two")
    torch.testing.assert_close(logits(model), alone["two"], **FP32_SIDE_BRANCH)


def test_merging_by_peft_gives_the_same_answers(
    tiny_base: Path, basis: Basis, customers: dict[str, Coefficients], adapters: Path
) -> None:
    model = open_all(tiny_base, adapters, "acme")
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, **FP32_SIDE_BRANCH)
    with pytest.raises(ValueError, match="not merged"):
        logits(model, adapter_names=["acme"] * 3)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, **FP32_SIDE_BRANCH)
    plain = model.merge_and_unload(safe_merge=True)
    assert not any("qrlora" in name for name, _ in plain.named_modules())
    torch.testing.assert_close(logits(plain), before, **FP32_SIDE_BRANCH)


def test_conv1d_is_adapted_and_merged(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": len(tokenizer), "n_positions": 64}
    torch.manual_seed(0)
    made = GPT2ForSequenceClassification(GPT2Config(**size, num_labels=3, pad_token_id=tokenizer.pad_token_id))
    made.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    basis = qr.factorize(tmp_path / "base", targets="attn.c_attn")
    basis.save(tmp_path / "basis.safetensors")
    model = qr.attach(load_base(tmp_path / "base"), basis)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    write_adapter(tmp_path / "base", basis, qr.coefficients_of(model), tmp_path / "one")
    found = open_all(tmp_path / "base", tmp_path, "one")
    torch.testing.assert_close(logits(found), logits(model), **FP32_SIDE_BRANCH)
    torch.testing.assert_close(logits(found.merge_and_unload()), logits(model), **FP32_SIDE_BRANCH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_memory", [False, True])
def test_coefficients_stay_fp32_beside_a_base_of_16_bits(
    dtype: torch.dtype,
    low_memory: bool,
    tiny_base: Path,
    adapters: Path,
    customers: dict[str, Coefficients],
    basis: Basis,
) -> None:
    model = peft.PeftModel.from_pretrained(
        load_base(tiny_base).to(dtype), adapters / "acme", low_cpu_mem_usage=low_memory
    )
    found = {name: parameter for name, parameter in model.named_parameters() if "qrlora_c" in name}
    assert {parameter.dtype for parameter in found.values()} == {torch.float32}
    values = np.concatenate([parameter.detach().numpy() for parameter in found.values()])
    np.testing.assert_array_equal(values, customers["acme"].values)
    exact = expected(tiny_base, basis, customers["acme"])
    torch.testing.assert_close(logits(model).float(), exact, rtol=0, atol=0.05)


def test_training_by_peft_moves_the_coefficients_alone_and_comes_back_from_its_folder(
    tiny_base: Path, basis: Basis, tmp_path: Path
) -> None:
    config = QRLoRAConfig(basis_file=str(tmp_path / "basis.safetensors"))
    model = peft.get_peft_model(load_base(tiny_base), config)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name.removeprefix("base_model.model.") for name in trained] == [
        f"{name}.qrlora_c.default" for name in basis.names
    ]
    assert torch.equal(logits(model), logits(load_base(tiny_base)))
    optimizer = torch.optim.Adam(trained.values(), lr=0.1)
    model(**INPUTS, labels=torch.tensor([2, 1, 0])).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "trained" / "one")
    again = open_all(tiny_base, tmp_path / "trained", "one")
    assert torch.equal(logits(again), logits(model))
    assert (logits(again) - logits(load_base(tiny_base))).abs().max() > 0.01
    assert again.peft_config["one"].basis_digest == basis.digest


def test_what_does_not_belong_together_is_refused(
    tiny_base: Path, basis: Basis, adapters: Path, tiny_customer: Coefficients, tmp_path: Path
) -> None:
    other = qr.factorize(tiny_base, targets="key")
    other.save(tmp_path / "other.safetensors")
    ones = replace(tiny_customer, values=np.ones(other.total_rank, np.float32), basis_digest=other.digest)
    write_adapter(tiny_base, other, ones, adapters / "other")
    model = open_all(tiny_base, adapters, "acme")
    with pytest.raises(BasisMismatchError, match="a model takes adapters of one basis"):
        model.load_adapter(adapters / "other", adapter_name="other")
    with pytest.raises(BasisMismatchError, match="were trained on basis"):
        write_adapter(tiny_base, other, tiny_customer, tmp_path / "x")
    with pytest.raises(InputError, match="save it first"):
        write_adapter(tiny_base, replace(basis, file=None), tiny_customer, tmp_path / "x")
    (tmp_path / "basis.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(BasisMismatchError, match=r"but .*basis\.safetensors is"):
        open_all(tiny_base, adapters, "acme")
    with pytest.raises(InputError, match="basis_file is empty"):
        peft.get_peft_model(load_base(tiny_base), QRLoRAConfig())


def test_a_base_with_other_weights_is_refused(tiny_base: Path, adapters: Path) -> None:
    model = load_base(tiny_base)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight.mul_(1.1)
    with pytest.raises(BasisMismatchError, match="1 of 4 targets differ"):
        peft.PeftModel.from_pretrained(model, adapters / "acme")


def test_pefts_own_registration_still_takes_no_foreign_method() -> None:
    """Why `register` writes into PEFT's tables; where this fails, it need not any more."""
    with pytest.raises(ValueError, match="Unknown PEFT type"):
        peft.utils.register_peft_method(name="qrlora_x", config_cls=QRLoRAConfig, model_cls=peft.LoraModel)
