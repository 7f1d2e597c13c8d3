"""LoRA folders for PEFT: PEFT itself loads them, and its logits are those of our side branch."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMConfig,
    XLMForSequenceClassification,
)

from exporters.onnx.synthetic_customers import base_customer
from exporters.peft.exporter import EXPORTER
from exporters.peft.lora_folder import export_peft
from qrlora_deploy.errors import BasisMismatchError, InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.exporting.registry import find_exporter
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.adapter import attach, set_coefficients
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.head import output_layer
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from tests.cli.running import run_here, succeed_here
from tests.tiny import SENTENCES, build_tokenizer
from tests.tolerances import EXACT, FP32_SIDE_BRANCH

peft = pytest.importorskip("peft", reason="needs peft, which the extra `test` brings")

BERT_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (BertForSequenceClassification, BertConfig, BERT_SIZES),
    "bert of 12 layers": (BertForSequenceClassification, BertConfig, BERT_SIZES | {"num_hidden_layers": 12}),
    # Its head is two layers, which PEFT wants both.
    "roberta": (RobertaForSequenceClassification, RobertaConfig, BERT_SIZES),
    # PEFT takes pre_classifier for a head too, by the end of its name.
    "distilbert": (
        DistilBertForSequenceClassification,
        DistilBertConfig,
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    ),
    "gpt2, of Conv1D": (GPT2ForSequenceClassification, GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    # Its head has a name that PEFT does not know.
    "xlm": (XLMForSequenceClassification, XLMConfig, {"emb_dim": 32, "n_layers": 2, "n_heads": 4}),
}


def save_model(name: str, folder: Path) -> Checkpoint:
    """A seeded, random classifier of four labels whose weights give logits well away from zero."""
    model_class, config_class, sizes = MODELS[name]
    tokenizer = build_tokenizer()
    general = {"vocab_size": len(tokenizer), "num_labels": 4, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config_class(**(general | sizes))).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return open_checkpoint(str(folder))


def make_customer(checkpoint: Checkpoint, basis: Basis, labels: int = 0) -> Coefficients:
    """Coefficients that are not zero, and with `labels` a head of its own."""
    random = np.random.default_rng(3)
    values = random.uniform(0.2, 0.6, basis.total_rank) * random.choice([-1.0, 1.0], basis.total_rank)
    customer = replace(base_customer(checkpoint, basis), values=values.astype(np.float32))
    if not labels:
        return customer
    layer = output_layer(checkpoint.skeleton())
    names = [name for name in (f"{layer}.weight", f"{layer}.bias") if name in checkpoint.tensor_files]
    shapes = {name: (labels, *checkpoint.read(name).shape[1:]) for name in names}
    head = {name: random.normal(scale=0.5, size=shape).astype(np.float32) for name, shape in shapes.items()}
    return replace(customer, head=head, labels=tuple(f"label {index}" for index in range(labels)))


def encoded(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The six sentences, padded; token types are left out, as some of the models know none."""
    both = checkpoint.tokenizer()(list(SENTENCES), padding=True, return_tensors="pt")
    return {name: both[name] for name in ("input_ids", "attention_mask")}


def side_branch_logits(checkpoint: Checkpoint, basis: Basis, customer: Coefficients) -> np.ndarray:
    """The logits of our own side branch, with the customer's head in place of the base's."""
    model = checkpoint.load_model()
    for name, values in customer.head.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, torch.nn.Parameter(torch.from_numpy(values)))
    # GPT-2 and BART reshape by what they believe the number of labels to be.
    model.num_labels = model.config.num_labels = len(customer.labels)
    set_coefficients(attach(model, basis), basis, customer.values)
    with torch.no_grad():
        return model(**encoded(checkpoint)).logits.numpy()


def peft_model(checkpoint: Checkpoint, folder: Path, labels: int = 4) -> Any:
    """What PEFT makes of the folder, with the base opened as its README says."""
    options = {} if labels == 4 else {"num_labels": labels, "ignore_mismatched_sizes": True}
    base = AutoModelForSequenceClassification.from_pretrained(checkpoint.folder, dtype=torch.float32, **options)
    return peft.PeftModel.from_pretrained(base, folder)


def peft_logits(checkpoint: Checkpoint, folder: Path, labels: int = 4) -> np.ndarray:
    with torch.no_grad():
        return peft_model(checkpoint, folder, labels)(**encoded(checkpoint)).logits.numpy()


def job_for(checkpoint: Checkpoint, basis: Basis, output: Path, customer: Coefficients | None) -> ExportJob:
    return ExportJob(checkpoint, basis, output, customer)


@pytest.fixture
def tiny_job(tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path) -> ExportJob:
    return job_for(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "lora", tiny_customer)


@pytest.mark.filterwarnings("error:fan_in_fan_out")
@pytest.mark.parametrize(
    "labels", [0, 4, 6, 3], ids=lambda labels: f"own head of {labels}" if labels else "base's head"
)
@pytest.mark.parametrize("name", MODELS)
def test_peft_answers_as_our_side_branch(name: str, labels: int, tmp_path: Path) -> None:
    checkpoint = save_model(name, tmp_path / "base")
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton()), EnergyShare(0.5))
    assert len(set(basis.ranks.values())) > 1, "one rank for all would hide a pattern that catches another's layer"
    customer = make_customer(checkpoint, basis, labels)
    export_peft(job_for(checkpoint, basis, tmp_path / "lora", customer))
    expected = side_branch_logits(checkpoint, basis, customer)
    base = side_branch_logits(checkpoint, basis, replace(customer, values=customer.values * 0))
    assert np.abs(expected - base).max() > 0.05, "a customer that changes nothing would hide every mistake"
    np.testing.assert_allclose(peft_logits(checkpoint, tmp_path / "lora", labels or 4), expected, **FP32_SIDE_BRANCH)


def test_layer_1_does_not_take_the_rank_of_layer_11(tmp_path: Path) -> None:
    checkpoint = save_model("bert of 12 layers", tmp_path / "base")
    chosen = [f"bert.encoder.layer.{index}.attention.self.query" for index in (1, 11)]
    parts = [factorize(checkpoint, [name], FixedRank(rank)) for name, rank in zip(chosen, (5, 9), strict=True)]
    for first, second in (parts, parts[::-1]):
        basis = replace(first, targets=first.targets + second.targets)
        customer = make_customer(checkpoint, basis)
        output = tmp_path / f"lora {basis.targets[0].rank}"
        export_peft(job_for(checkpoint, basis, output, customer))
        model = peft_model(checkpoint, output)
        shapes = {
            name: tuple(module.lora_A["default"].weight.shape)
            for name, module in model.base_model.model.named_modules()
            if hasattr(module, "lora_A")
        }
        assert shapes == {chosen[0]: (5, 32), chosen[1]: (9, 32)}
        layers = [module for module in model.base_model.modules() if hasattr(module, "lora_A")]
        assert [layer.scaling for layer in layers] == [{"default": 1.0}] * 2
        expected = side_branch_logits(checkpoint, basis, customer)
        np.testing.assert_allclose(peft_logits(checkpoint, output), expected, **FP32_SIDE_BRANCH)


def test_folding_in_by_peft_turns_conv1d_the_right_way(tmp_path: Path) -> None:
    checkpoint = save_model("gpt2, of Conv1D", tmp_path / "base")
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton(), ("c_attn", "c_fc")), EnergyShare(0.5))
    customer = make_customer(checkpoint, basis)
    export_peft(job_for(checkpoint, basis, tmp_path / "lora", customer))
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text("utf-8"))["fan_in_fan_out"] is True
    merged = peft_model(checkpoint, tmp_path / "lora").merge_and_unload()
    with torch.no_grad():
        found = merged(**encoded(checkpoint)).logits.numpy()
    np.testing.assert_allclose(found, side_branch_logits(checkpoint, basis, customer), **FP32_SIDE_BRANCH)


def test_basis_of_a_bare_encoder_serves_the_classifier(tiny_job: ExportJob) -> None:
    bare = tuple(replace(target, name=target.name.removeprefix("bert.")) for target in tiny_job.basis.targets)
    basis = replace(tiny_job.basis, targets=bare)
    assert tiny_job.coefficients is not None
    customer = replace(tiny_job.coefficients, basis_digest=basis.digest)
    written = export_peft(replace(tiny_job, basis=basis, coefficients=customer))
    assert all(path.startswith("bert.encoder.") for path in written["targets"])
    expected = side_branch_logits(tiny_job.checkpoint, basis, customer)
    np.testing.assert_allclose(peft_logits(tiny_job.checkpoint, tiny_job.output), expected, **FP32_SIDE_BRANCH)


def test_folder_holds_the_three_files_and_the_base_head(tiny_job: ExportJob) -> None:
    written = export_peft(tiny_job)
    json.dumps(written)
    assert written["kind"] == "peft" and written["modules_to_save"] == ["classifier"]
    names = {path.name for path in tiny_job.output.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = json.loads((tiny_job.output / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == tiny_job.checkpoint.name
    assert config["task_type"] == "SEQ_CLS" and config["bias"] == "none"
    assert config["target_modules"] == tiny_job.basis.names
    tensors = load_file(tiny_job.output / "adapter_model.safetensors")
    assert all(array.dtype == np.float32 for array in tensors.values())
    for part in ("weight", "bias"):
        own = tiny_job.checkpoint.read(f"classifier.{part}").numpy()
        np.testing.assert_allclose(tensors[f"base_model.model.classifier.{part}"], own, **EXACT)
    first = tiny_job.basis.targets[0]
    np.testing.assert_allclose(tensors[f"base_model.model.{first.name}.lora_A.weight"], first.r, **EXACT)


def test_readme_loads_the_folder(tmp_path: Path, tiny_job: ExportJob, monkeypatch: pytest.MonkeyPatch) -> None:
    customer = make_customer(tiny_job.checkpoint, tiny_job.basis, 6)
    export_peft(replace(tiny_job, coefficients=customer))
    code = (tiny_job.output / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)  # what a reader of the README does
    inputs = AutoTokenizer.from_pretrained(tiny_job.checkpoint.folder)(SENTENCES[0], return_tensors="pt")
    assert names["model"](**inputs).logits.shape == (1, 6)


Change = Callable[[ExportJob], ExportJob]
REFUSED: dict[str, tuple[Change, type[InputError], str]] = {
    "no customer": (lambda job: replace(job, coefficients=None), InputError, "coefficients"),
    "another basis": (
        lambda job: replace(job, coefficients=replace(job.coefficients, basis_digest="0" * 64)),  # type: ignore[type-var]
        BasisMismatchError,
        "trained on basis 000000000000",
    ),
    "another base": (
        lambda job: replace(job, coefficients=replace(job.coefficients, base_digest="0" * 64)),  # type: ignore[type-var]
        BasisMismatchError,
        "trained on base 000000000000",
    ),
    "a head that does not fit": (
        lambda job: replace(job, coefficients=replace(job.coefficients, head={"no.weight": np.ones((4, 3), "f4")})),  # type: ignore[type-var]
        InputError,
        "no tensor no.weight",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(why: str, tiny_job: ExportJob) -> None:
    change, error, message = REFUSED[why]
    with pytest.raises(error, match=message) as caught:
        export_peft(change(tiny_job))
    assert "\n" not in str(caught.value)
    assert list(tiny_job.output.parent.iterdir()) == []


def test_target_inside_a_head_that_peft_keeps_whole_is_refused(tmp_path: Path) -> None:
    checkpoint = save_model("roberta", tmp_path / "base")
    basis = factorize(
        checkpoint, choose_targets(checkpoint.skeleton(), ("query", "classifier.dense")), EnergyShare(0.5)
    )
    with pytest.raises(InputError, match="PEFT keeps classifier whole .* classifier.dense"):
        export_peft(job_for(checkpoint, basis, tmp_path / "lora", make_customer(checkpoint, basis)))
    assert not (tmp_path / "lora").exists()


def test_folder_that_is_in_use_is_left_alone(tiny_job: ExportJob) -> None:
    tiny_job.output.mkdir()
    (tiny_job.output / "mine").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        export_peft(tiny_job)
    assert [path.name for path in tiny_job.output.iterdir()] == ["mine"]


def test_command_line_writes_a_folder(tiny_customer_file: Path, tiny_job: ExportJob, tmp_path: Path) -> None:
    assert find_exporter("peft") is EXPORTER
    options = ["export", "--format", "peft", "--coefficients", tiny_customer_file, "-o", "lora"]
    assert succeed_here(options, tmp_path)["kind"] == "peft"
    expected = side_branch_logits(tiny_job.checkpoint, tiny_job.basis, tiny_job.coefficients)  # type: ignore[arg-type]
    np.testing.assert_allclose(peft_logits(tiny_job.checkpoint, tmp_path / "lora"), expected, **FP32_SIDE_BRANCH)
    ran = run_here(*options[:-1], "other", "--head-labels", 6, cwd=tmp_path)
    assert ran.code == 2 and ran.err.startswith("Error: --head-labels") and ran.err.count("\n") == 1
    assert not (tmp_path / "other").exists()
