"""config.json and what lies beside it: right, or refused by file and field; code of a checkpoint is never run."""

import ast
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForQuestionAnswering,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)

from exporters.onnx import export_merged, export_switchable
from exporters.onnx.accuracy import choose_labelled
from exporters.onnx.options import OnnxOptions
from qrlora_deploy.data.examples import Examples, read_examples
from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.merging.checkpoints import merge
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.names import label_index
from qrlora_deploy.tasks.registry import task_named
from qrlora_deploy.training.outputs import own_outputs
from qrlora_deploy.training.settings import TrainSettings, WarmupSettings
from qrlora_deploy.training.trainer import train
from qrlora_deploy.training.warmup import warmup
from tests.tiny import LABELS, SENTENCES

ROWS = Examples(list(SENTENCES[:4]), None, list(LABELS), "rows")


@pytest.fixture
def with_config(tiny_base: Path, tmp_path: Path) -> Callable[..., Checkpoint]:
    """Makes a copy of the tiny base whose config differs."""

    def make(**changes: object) -> Checkpoint:
        folder = tmp_path / "base"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_base, folder)
        settings = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(settings))
        return open_checkpoint(str(folder))

    return make


NAMED = {"0": "travel", "1": "banking", "2": "home"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"1": "a", "2": "b", "3": "c", "4": "d"}}, "id2label must count the outputs from 0 on; it has 1"),
        ({"id2label": NAMED | {"3": "banking"}}, "id2label calls the outputs 1 and 3 both 'banking'"),
        ({"id2label": NAMED | {"3": " banking"}}, "id2label calls the outputs 1 and 3 both 'banking'"),
        ({"id2label": NAMED | {"3": " "}}, "id2label gives the output 3 no usable name: ' '"),
        ({"id2label": NAMED | {"3": ["x"]}}, "id2label"),
        ({"id2label": NAMED | {"3": "\ud83d"}}, "id2label|half of a character"),
        ({"id2label": ["a", "b", "c", "d"]}, "id2label must be an object"),
        ({"id2label": {"x": "a"}}, "id2label must have the numbers of the outputs as keys, not 'x'"),
        ({"num_labels": 10**9, "id2label": None}, "num_labels must be a number from 1 to 1000000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; more than 2000"),
        ({"model_type": 5}, "model_type must be a text, not 5"),
        ({"vocab_size": "x"}, "vocab_size"),
        ({"hidden_act": "x"}, "transformers has no hidden_act 'x'"),
        ({"num_attention_heads": 5}, "makes no BertForSequenceClassification: The hidden size"),
        ({"use_return_dict": False}, "use_return_dict"),
        ({"architectures": 5}, "architectures"),
        ({"architectures": ["Trainer"]}, "transformers has no architecture 'Trainer'"),
        (
            {"architectures": ["RobertaForSequenceClassification"]},
            "none of model_type 'bert'",
        ),
        ({"problem_type": "regression"}, "predicts 4 numbers; one is supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "has a quantization_config"),
    ],
)
def test_what_is_wrong_is_named_by_every_command(
    with_config: Callable[..., Checkpoint],
    tiny_basis: Basis,
    tiny_customer: Coefficients,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    base = with_config(**changes)
    job = ExportJob(base, tiny_basis, tmp_path / "out", tiny_customer)
    settings = TrainSettings(epochs=1, max_length=16, device="cpu")
    for command in (
        lambda: factorize(base, list(tiny_basis.names), EnergyShare()),
        lambda: train(base, tiny_basis, ROWS, None, settings, tmp_path / "out"),
        lambda: merge(base, tiny_basis, tiny_customer, tmp_path / "out"),
        lambda: export_merged(job),
        lambda: export_switchable(replace(job, coefficients=None)),
    ):
        with pytest.raises(InputError, match=message) as caught:
            command()
        assert "base" in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"return_dict": False},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_3"},
        {"_attn_implementation": "someone/a-kernel-of-the-hub"},
        {"chunk_size_feed_forward": 4},
        {"output_attentions": True, "output_hidden_states": True},
        {"auto_map": {"AutoConfig": "configuration_my.My"}},
    ],
)
def test_what_the_product_chooses_itself_changes_nothing(
    with_config: Callable[..., Checkpoint], tiny_base: Path, changes: dict[str, Any]
) -> None:
    base = with_config(**changes)
    base.check_base()
    ids = torch.tensor([[2, 7, 9, 3, 11]])
    with torch.no_grad():
        expected = AutoModelForSequenceClassification.from_pretrained(tiny_base).eval()(ids).logits
        assert torch.allclose(base.load_model()(ids).logits, expected, atol=1e-6)


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def _heard() -> Any:
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _SIDES.items()}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
    shape = {"d_model": 16, "vocab_size": 9, "num_mel_bins": 4, "max_source_positions": 9, "classifier_proj_size": 4}
    return WhisperForAudioClassification(WhisperConfig(**sizes, **ids, **shape))


_SIDES = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (BertForQuestionAnswering.from_pretrained, "is a BertForQuestionAnswering, whose head is for another task"),
        (
            lambda base: ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4)),
            "none of model type",
        ),
        (lambda base: _heard(), "transformers has none of model type 'whisper'"),
    ],
    ids=["questions", "images", "audio"],
)
def test_models_for_other_tasks_are_no_bases(
    make: Callable[[Path], Any], message: str, tiny_base: Path, tiny_customer: Coefficients, tmp_path: Path
) -> None:
    make(tiny_base).save_pretrained(tmp_path / "other")
    other = open_checkpoint(str(tmp_path / "other"))
    with pytest.raises(InputError, match=message):
        factorize(other, [], EnergyShare())
    with pytest.raises(InputError, match="without a task head|none of model type"):
        _ = other.task


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PretrainedConfig
class My(PretrainedConfig):
    model_type = "my"
"""


@pytest.mark.parametrize("answer", ["y\n" * 20, ""])
def test_code_of_a_checkpoint_is_neither_run_nor_offered(
    with_config: Callable[..., Checkpoint],
    tiny_basis: Basis,
    tmp_path: Path,
    answer: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    marker = tmp_path / "was-run"
    names = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoTokenizer")
    references = dict.fromkeys(names, "configuration_my.My")
    base = with_config(model_type="my", auto_map=references)
    (base.folder / "configuration_my.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    message = "config.json: auto_map names code of the checkpoint's own, which is never run, .* no model type 'my'"
    settings = WarmupSettings(epochs=1, max_length=16, device="cpu")
    for command in (
        base.check_base,
        lambda: base.labels,
        lambda: warmup(base, ROWS, None, tmp_path / "out", settings),
        lambda: factorize(base, list(tiny_basis.names), EnergyShare()),
    ):
        with pytest.raises(InputError, match=message):
            command()
    assert not marker.exists() and "[y/N]" not in "".join(capfd.readouterr())


def test_code_of_a_tokenizer_is_neither_run_nor_offered(
    with_config: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "was-run"
    base = with_config()
    (base.folder / "tokenizer.json").unlink()
    (base.folder / "tokenization_my.py").write_text(CODE.format(marker=str(marker)))
    reference = {"auto_map": {"AutoTokenizer": [None, "tokenization_my.My"]}, "tokenizer_class": "My"}
    (base.folder / "tokenizer_config.json").write_text(json.dumps(reference))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    with pytest.raises(InputError, match="holds no usable tokenizer"):
        base.tokenizer()
    assert not marker.exists()


def test_nothing_asks_transformers_for_code_of_others() -> None:
    """Every call that can run code of a checkpoint says that it must not; examples for users in texts aside."""
    root = Path(__file__).parents[2]
    for package in ("qrlora_deploy", "exporters", "benchmarks", "docs"):
        for file in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                # A config or an adapter of PEFT's, which hold no code, are read by its own classes.
                own = "super()" in called or called.startswith("PeftModel.")
                if isinstance(node, ast.Call) and called.endswith(".from_pretrained") and not own:
                    said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert said.get("trust_remote_code") == "False", f"{file}:{node.lineno}"


def test_a_tokenizer_of_sentencepiece_names_the_package(
    with_config: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = with_config()
    (base.folder / "tokenizer.json").unlink()
    (base.folder / "sentencepiece.bpe.model").write_bytes(b"no model")
    monkeypatch.setattr("qrlora_deploy.models.tokenizer_files.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"sentencepiece\.bpe\.model needs the package sentencepiece, which is not"):
        base.tokenizer()


def test_blanks_around_names_are_nobodys(
    with_config: Callable[..., Checkpoint], tiny_basis: Basis, tmp_path: Path
) -> None:
    base = with_config(id2label={"0": " travel", "1": "banking ", "2": "home", "3": "kitchen"})
    (tmp_path / "rows.tsv").write_text(
        "text\tlabel\n" + "".join(f"{text}\t {label} \n" for text, label in zip(SENTENCES, LABELS, strict=False))
    )
    rows = read_examples(tmp_path / "rows.tsv")
    assert base.labels == LABELS and task_named(base.task).encode(rows, base.labels) == [0, 1, 2, 3]
    export_switchable(ExportJob(base, tiny_basis, tmp_path / "bundle"), OnnxOptions(data=rows))
    assert open_bundle(tmp_path / "bundle").manifest.labels == LABELS


def test_numbers_are_the_names_that_transformers_gives() -> None:
    names = tuple(f"LABEL_{index}" for index in range(12))
    by_number = Examples(["a"] * 3, None, ["0", "11", "LABEL_2"], "rows")
    assert Classification().encode(by_number, names) == [0, 11, 2]
    for wrong in ("12", "-1", "00", "1.5", "label_1"):
        with pytest.raises(InputError, match=f"unknown label '{wrong}'; the head knows 'LABEL_0', 'LABEL_1'"):
            Classification().encode(replace(by_number, labels=["0", "1", wrong]), names)
    assert label_index(("LABEL_1", "LABEL_0")) == {"LABEL_1": 0, "LABEL_0": 1}
    assert label_index(("LABEL_0", "other")) == {"LABEL_0": 0, "other": 1}
    assert choose_labelled(by_number, Classification(), names, strict=True) is not None


def test_a_trained_head_of_numbered_names_is_kept(with_config: Callable[..., Checkpoint], tmp_path: Path) -> None:
    base = with_config(id2label={str(index): f"LABEL_{index}" for index in range(4)})
    rows = replace(ROWS, labels=["0", "1", "2", "3"])
    assert not own_outputs(base, rows).new and own_outputs(base, rows).labels == base.labels
    assert own_outputs(base, replace(ROWS, labels=["0", "1", "2", "9"])).new
    settings = WarmupSettings(epochs=1, max_length=16, device="cpu", learning_rate=1e-9)
    warmup(base, rows, None, tmp_path / "out", settings)
    kept = open_checkpoint(str(tmp_path / "out"))
    assert kept.labels == base.labels
    np.testing.assert_allclose(kept.read("classifier.weight"), base.read("classifier.weight"), atol=1e-6)


def test_any_type_of_any_field_is_right_or_refused(with_config: Callable[..., Checkpoint]) -> None:
    fields = [*json.loads((with_config().folder / "config.json").read_text()), "num_labels", "auto_map", "pruned_heads"]
    for field in fields:
        for value in ("x", -1, 10**12, [1], {"a": 1}, None):
            base = with_config(**{field: value})
            try:
                base.check_base()
                _ = base.task, base.labels
            except QrloraError as error:
                assert "base" in str(error) and "\n" not in str(error)
