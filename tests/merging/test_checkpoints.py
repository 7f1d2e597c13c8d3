"""Merging into real checkpoint folders: sharded, fp32 and bf16, Linear and Conv1D."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from qrlora_deploy.errors import BasisMismatchError, FileFormatError, InputError, QrloraError
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis, BasisTarget, write_basis
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.formats.provenance import read_provenance
from qrlora_deploy.merging.arithmetic import round_once
from qrlora_deploy.merging.checkpoints import merge, merge_model, merged_weight, unmerge
from qrlora_deploy.models.adapter import attach, set_coefficients
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from tests.tolerances import EXACT, FP32_SIDE_BRANCH, ONE_ROUNDING

BERT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32, "num_labels": 3,
}  # fmt: skip
GPT2 = {
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "num_labels": 3,
    "pad_token_id": 0,
}
SEEDS = {
    "bert": (BertForSequenceClassification, BertConfig, BERT),
    "gpt2": (GPT2ForSequenceClassification, GPT2Config, GPT2),
}
TOKENS = torch.tensor([[5, 9, 2, 7, 11, 3], [8, 4, 6, 1, 0, 0]])
MASK = (TOKENS != 0).long()


class Case(NamedTuple):
    base: Checkpoint
    basis: Basis
    customer: Coefficients


def save_model(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """A seeded model with spread-out weights, in several shards."""
    model_class, config_class, options = SEEDS[kind]
    torch.manual_seed(3)
    model = model_class(config_class(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                (1.0 if "ayerNorm.weight" in name or "ln_" in name else 0.0) + 0.3 * torch.randn_like(parameter)
            )
    model.to(dtype).save_pretrained(folder, max_shard_size="3KB")
    (folder / "pytorch_model.bin").write_bytes(b"stale weights in another format")
    return open_checkpoint(str(folder))


def make_customer(base: Checkpoint, basis: Basis, **changes: Any) -> Coefficients:
    values = np.random.default_rng(1).normal(0, 0.7, basis.total_rank).astype(np.float32)
    labels = ("yes", "no", "may|be")
    fields = {"values": values, "basis_digest": basis.digest, "base_name": base.name, "base_digest": base.digest}
    return Coefficients(
        **(fields | {"task": "text-classification", "labels": labels, "training": {"seed": 1}} | changes)
    )


@pytest.fixture(scope="module", params=[(k, d) for k in SEEDS for d in (torch.float32, torch.bfloat16)], ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, dtype = request.param
    base = save_model(tmp_path_factory.mktemp(kind) / "base", kind, dtype)
    basis = factorize(base, choose_targets(base.skeleton()), EnergyShare(0.6))
    return Case(base, basis, make_customer(base, basis))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Case:
    base = save_model(tmp_path_factory.mktemp("bert") / "base", "bert")
    basis = factorize(base, choose_targets(base.skeleton(), ["query", "value"]), EnergyShare(0.6))
    return Case(base, basis, make_customer(base, basis))


def logits_of(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, attention_mask=MASK).logits.float().numpy()


def side_branch_logits(case: Case) -> np.ndarray:
    model = case.base.load_model()
    set_coefficients(attach(model, case.basis), case.basis, case.customer.values)
    return logits_of(model)


def stored(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.tensor_files}


def test_merged_checkpoint_equals_the_side_branch(case: Case, tmp_path: Path) -> None:
    assert len(case.base.shards) > 2
    report = merge(case.base, case.basis, case.customer, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected, base = side_branch_logits(case), logits_of(case.base.load_model())
    assert np.abs(expected - base).max() > 0.05, "the customer must move the logits, or the test says nothing"
    dtype = next(iter(stored(case.base).values())).dtype
    if dtype == torch.float32:
        np.testing.assert_allclose(logits_of(model), expected, **FP32_SIDE_BRANCH)
    else:
        # Half a unit in 8 bits on every weight; the logits are of order 1.
        np.testing.assert_allclose(logits_of(model), expected, rtol=0, atol=0.1)
    assert report.targets == tuple(case.basis.names) and report.max_update > 0.05
    assert 0 <= report.unchanged_share < 1 and report.output == tmp_path / "out"
    assert model.config.id2label == {0: "yes", 1: "no", 2: "may|be"}


def test_each_stored_weight_is_the_exact_sum_rounded_once(case: Case, tmp_path: Path) -> None:
    report = merge(case.base, case.basis, case.customer, tmp_path / "out")
    before, after = stored(case.base), stored(open_checkpoint(str(tmp_path / "out")))
    assert before.keys() == after.keys()
    tensors = {case.base.tensor_of(target.name): target for target in case.basis.targets}
    parts = case.basis.split(case.customer.values)
    worst = 0.0
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        if name not in tensors:
            assert torch.equal(after[name], weight), name
            continue
        target = tensors[name]
        delta = (
            target.q.astype(np.float64) @ np.diag(parts[target.name].astype(np.float64)) @ target.r.astype(np.float64)
        )
        conv1d = case.base.architecture.startswith("GPT2")
        exact = weight.double().numpy() + (delta.T if conv1d else delta)
        error = np.abs(after[name].double().numpy() - exact)
        bound = ONE_ROUNDING[str(weight.dtype).removeprefix("torch.")]
        assert (error <= np.abs(exact) * bound * (1 + 1e-6) + 1e-30).all(), name
        worst = max(worst, float(error.max()))
    assert report.max_rounding_error == pytest.approx(worst, rel=1e-6, abs=1e-12)


def test_merged_folder_explains_itself(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(case.base, case.basis, case.customer, out)
    provenance = read_provenance(out)
    assert provenance.base_digest == case.base.digest and provenance.basis_digest == case.basis.digest
    assert [target.rank for target in provenance.targets] == list(case.basis.ranks.values())
    card = (out / "README.md").read_text()
    assert case.basis.digest in card and "may\\|be" in card and str(case.base.folder.parent) not in card
    assert not (out / "pytorch_model.bin").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in out.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(w.numel() * w.element_size() for w in stored(case.base).values())


def test_model_in_memory_is_merged_like_the_files(bert: Case, tmp_path: Path) -> None:
    model = bert.base.load_model()
    merge_model(model, bert.base, bert.basis, bert.customer)
    merge(bert.base, bert.basis, bert.customer, tmp_path / "out")
    for name, weight in stored(open_checkpoint(str(tmp_path / "out"))).items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_conv1d_in_memory(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "gpt2")
    basis = factorize(base, choose_targets(base.skeleton(), ["c_attn"]), EnergyShare(0.6))
    case = Case(base, basis, make_customer(base, basis))
    model = base.load_model()
    merge_model(model, *case)
    np.testing.assert_allclose(logits_of(model), side_branch_logits(case), **FP32_SIDE_BRANCH)


def test_zero_coefficients_leave_every_bit(case: Case, tmp_path: Path) -> None:
    zero = replace(case.customer, values=np.zeros(case.basis.total_rank, np.float32))
    report = merge(case.base, case.basis, zero, tmp_path / "out")
    after = stored(open_checkpoint(str(tmp_path / "out")))
    assert all(torch.equal(after[name], weight) for name, weight in stored(case.base).items())
    assert (report.max_update, report.max_rounding_error, report.unchanged_share) == (0.0, 0.0, 0.0)


def test_unmerge_by_subtraction_gives_the_base_to_its_roundings(case: Case, tmp_path: Path) -> None:
    merge(case.base, case.basis, case.customer, tmp_path / "merged")
    merged = open_checkpoint(str(tmp_path / "merged"))
    report = unmerge(merged, case.basis, case.customer, tmp_path / "back")
    back, forward = stored(open_checkpoint(str(tmp_path / "back"))), stored(merged)
    worst = 0.0
    for name, weight in stored(case.base).items():
        error = (back[name].double() - weight.double()).abs()
        unit = ONE_ROUNDING[str(weight.dtype).removeprefix("torch.")]
        # The merge rounded the merged weight, the subtraction its own result.
        bound = unit * (forward[name].double().abs() + back[name].double().abs()) * (1 + unit)
        assert bool((error <= bound + 1e-30).all()), name
        worst = max(worst, float(error.max()))
    assert worst <= report.max_deviation and (not report.exact or worst == 0)
    assert not (tmp_path / "back" / "qrlora.json").exists() and not (tmp_path / "back" / "README.md").exists()
    assert open_checkpoint(str(tmp_path / "back")).labels == case.base.labels
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "back", dtype=torch.float32)
    tolerance = FP32_SIDE_BRANCH if unit < 1e-6 else {"rtol": 0.0, "atol": 0.1}
    np.testing.assert_allclose(logits_of(model), logits_of(case.base.load_model()), **tolerance)


def test_unmerge_with_the_base_is_bit_exact(case: Case, tmp_path: Path) -> None:
    merge(case.base, case.basis, case.customer, tmp_path / "merged")
    merged = open_checkpoint(str(tmp_path / "merged"))
    report = unmerge(merged, case.basis, case.customer, tmp_path / "back", base=case.base)
    assert report.exact and report.max_deviation == 0
    for path in [*case.base.shards, case.base.folder / "config.json"]:
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    merge(open_checkpoint(str(tmp_path / "back")), case.basis, case.customer, tmp_path / "again")
    for path in merged.shards:
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def with_head(case: Case, outputs: int = 5) -> Coefficients:
    random = np.random.default_rng(2)
    head = {
        "classifier.weight": random.normal(size=(outputs, 16)).astype(np.float32),
        "classifier.bias": random.normal(size=outputs).astype(np.float32),
    }
    return replace(case.customer, head=head, labels=tuple(f"intent {index}" for index in range(outputs)))


def test_own_head_and_labels_replace_those_of_the_base(bert: Case, tmp_path: Path) -> None:
    customer = with_head(bert)
    merge(bert.base, bert.basis, customer, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label[4] == "intent 4" and logits_of(model).shape == (2, 5)
    np.testing.assert_array_equal(model.classifier.weight.detach().numpy(), customer.head["classifier.weight"])
    in_memory = bert.base.load_model()
    merge_model(in_memory, bert.base, bert.basis, customer)
    np.testing.assert_allclose(logits_of(in_memory), logits_of(model), **EXACT)
    assert in_memory.config.num_labels == 5
    merged = open_checkpoint(str(tmp_path / "out"))
    with pytest.raises(InputError, match="give the base"):
        unmerge(merged, bert.basis, customer, tmp_path / "back")
    assert unmerge(merged, bert.basis, customer, tmp_path / "back", base=bert.base).exact


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("a", "b")}, "2 labels, but 3 outputs"),
        ({"head": {"score.weight": np.ones((3, 16), np.float32)}}, "no tensor score.weight"),
        ({"head": {"classifier.weight": np.ones((3, 8), np.float32)}}, r"is \[3, 16\], the customer's \[3, 8\]"),
        ({"values": np.ones(3, np.float32)}, "found 3"),
    ],
)
def test_customer_that_does_not_fit_is_refused(bert: Case, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        merge(bert.base, bert.basis, replace(bert.customer, **changes), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["basis_digest", "base_digest"])
def test_wrong_basis_or_base_is_refused(bert: Case, tmp_path: Path, field: str) -> None:
    with pytest.raises(BasisMismatchError, match="0000"):
        merge(bert.base, bert.basis, replace(bert.customer, **{field: "0" * 64}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_basis_of_other_weights_is_refused(bert: Case, tmp_path: Path) -> None:
    first = replace(bert.basis.targets[0], weight_digest="0" * 64)
    basis = replace(bert.basis, targets=(first, *bert.basis.targets[1:]))
    with pytest.raises(BasisMismatchError, match=first.name):
        merge(bert.base, basis, bert.customer, tmp_path / "out")


def test_merging_twice_is_refused(bert: Case, tmp_path: Path) -> None:
    merge(bert.base, bert.basis, bert.customer, tmp_path / "out")
    with pytest.raises(InputError, match="merged already"):
        merge(open_checkpoint(str(tmp_path / "out")), bert.basis, bert.customer, tmp_path / "twice")
    with pytest.raises(InputError, match="already exists"):
        merge(bert.base, bert.basis, bert.customer, tmp_path / "out")


def test_quantised_base_is_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "bert")
    basis = factorize(base, choose_targets(base.skeleton(), ["query"]), EnergyShare())
    config = json.loads((base.folder / "config.json").read_text())
    (base.folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match="is quantised: .*config.json has a quantization_config"):
        merge(open_checkpoint(base.name), basis, make_customer(base, basis), tmp_path / "out")


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "bert")
    basis = factorize(base, choose_targets(base.skeleton(), ["query"]), EnergyShare())
    attention = base.skeleton().bert.encoder.layer[0].attention.self
    attention.key.weight = attention.query.weight
    with pytest.raises(InputError, match=r"tied weights.*layer.0.attention.self.query \(with .*layer.0.*self.key\)"):
        merge(base, basis, make_customer(base, basis), tmp_path / "out")


def test_a_model_that_writes_text_is_not_merged(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(**GPT2)).save_pretrained(tmp_path / "base")
    base = open_checkpoint(str(tmp_path / "base"))
    layer = "transformer.h.0.attn.c_proj"
    ones = np.ones((16, 1), np.float32)
    target = BasisTarget(layer, ones, ones.T, np.ones(16, np.float32), base.tensor_digest(f"{layer}.weight"))
    customer = Coefficients(np.ones(1, np.float32), "0", "base", base.digest, "text-classification", ("a", "b"))
    with pytest.raises(
        InputError,
        match="is a GPT2LMHeadModel, which writes text; give it a head for text-classification with `warmup`",
    ):
        merge(base, Basis((target,), "base", EnergyShare(), {}), customer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unmerge_refuses_what_it_did_not_merge(bert: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="was not written by"):
        unmerge(bert.base, bert.basis, bert.customer, tmp_path / "back")
    merge(bert.base, bert.basis, bert.customer, tmp_path / "merged")
    merged = open_checkpoint(str(tmp_path / "merged"))
    other = replace(bert.customer, values=bert.customer.values + 1)
    with pytest.raises(BasisMismatchError, match="merged from coefficients"):
        unmerge(merged, bert.basis, other, tmp_path / "back")
    with pytest.raises(BasisMismatchError, match="is not the base"):
        unmerge(merged, bert.basis, bert.customer, tmp_path / "back", base=merged)
    record = json.loads((merged.folder / "qrlora.json").read_text())
    record["targets"][0]["merged_digest"] = "0" * 64
    (merged.folder / "qrlora.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="changed after the merge"):
        unmerge(merged, bert.basis, bert.customer, tmp_path / "back")
    for damage in ("[]", "{", json.dumps(record | {"format_version": 9}), json.dumps(record | {"extra": 1})):
        (merged.folder / "qrlora.json").write_text(damage)
        with pytest.raises(FileFormatError):
            unmerge(merged, bert.basis, bert.customer, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_sum_that_does_not_fit_fp16_is_refused() -> None:
    ones = np.ones((1, 1), np.float32)
    target = BasisTarget("layer", ones, ones, ones[0], "")
    with pytest.raises(QrloraError, match="does not fit torch.float16"):
        merged_weight(torch.full((1, 1), 6e4, dtype=torch.float16), target, np.array([6e4], np.float32))
    with pytest.raises(InputError, match="int8"):
        merged_weight(torch.ones((1, 1), dtype=torch.int8), target, np.ones(1, np.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype) -> None:
    """Values just off a midpoint, where rounding by way of fp32 falls on the wrong side."""
    low = torch.linspace(0.1, 7, 500, dtype=torch.float64).to(dtype)
    middle = (low.double() + torch.nextafter(low, torch.full_like(low, 99)).double()) / 2
    assert torch.equal(round_once(middle - 1e-13, dtype), low)
    assert torch.equal(round_once(middle + 1e-13, dtype), torch.nextafter(low, torch.full_like(low, 99)))
    assert torch.equal(round_once(-(middle - 1e-13), dtype), -low)
    assert not torch.equal((middle - 1e-13).to(dtype), low), "PyTorch rounds once now: round_once can go"


KILLED = """
import os, signal, sys
from pathlib import Path
from qrlora_deploy.merging.checkpoints import merge
from qrlora_deploy.formats.basis import read_basis
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.formats.coefficients import read_coefficients

def die(what, done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

base, basis, customer, out = sys.argv[1:]
merge(open_checkpoint(base), read_basis(Path(basis)), read_coefficients(Path(customer)), Path(out), die)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_killed_in_the_middle_leaves_no_output(bert: Case, tmp_path: Path) -> None:
    write_basis(bert.basis, tmp_path / "basis.safetensors")
    write_coefficients(bert.customer, tmp_path / "acme.safetensors")
    arguments = [bert.base.name, str(tmp_path / "basis.safetensors"), str(tmp_path / "acme.safetensors")]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments, str(tmp_path / "out")], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    merge(bert.base, bert.basis, bert.customer, tmp_path / "out")


def test_error_in_the_middle_leaves_nothing(bert: Case, tmp_path: Path) -> None:
    def fail(what: str, done: int, total: int) -> None:
        if done == 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(QrloraError, match="No space left"):
        merge(bert.base, bert.basis, bert.customer, tmp_path / "out", fail)
    assert list(tmp_path.iterdir()) == []
