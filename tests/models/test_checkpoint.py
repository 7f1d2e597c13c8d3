"""Base models on disk: shards, prefixes, missing and damaged files, and digests that notice every change."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from qrlora_deploy.errors import BasisMismatchError, FileFormatError, InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.basis_fit import check_basis_fits
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.weight_files import INDEX, SINGLE

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def sharded(tiny_base: Path, tmp_path: Path) -> Path:
    model = BertForSequenceClassification.from_pretrained(tiny_base)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    return tmp_path / "sharded"


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder))


def test_what_a_checkpoint_says_of_itself(tiny_base: Path) -> None:
    checkpoint = opened(tiny_base)
    assert (checkpoint.folder, checkpoint.name) == (tiny_base, str(tiny_base))
    assert checkpoint.architecture == "BertForSequenceClassification" and checkpoint.has_task_head
    assert checkpoint.labels == ("travel", "banking", "home", "kitchen")
    assert checkpoint.task == "text-classification" and checkpoint.shards == [tiny_base / SINGLE]
    assert checkpoint.tokenizer().pad_token == "[PAD]"


def test_the_skeleton_takes_no_memory_and_the_model_is_fp32(tiny_base: Path) -> None:
    checkpoint = opened(tiny_base)
    assert all(parameter.is_meta for parameter in checkpoint.skeleton().parameters())
    model = checkpoint.load_model()
    assert not model.training and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert checkpoint.load_model(dtype=torch.bfloat16).dtype == torch.bfloat16
    state = model.state_dict()
    assert all(torch.equal(checkpoint.read(name), state[name]) for name in checkpoint.tensor_files)


def test_shards_hold_the_same_base(tiny_base: Path, sharded: Path) -> None:
    one, many = opened(tiny_base), opened(sharded)
    assert len(many.shards) > 3 and len(set(many.tensor_files.values())) == len(many.shards)
    assert many.tensor_files.keys() == one.tensor_files.keys()
    assert many.digest == one.digest, "the digest is of the tensors, not of the files"
    tensor = many.tensor_of(QUERY)
    assert torch.equal(many.read(tensor), one.read(tensor))


@pytest.mark.parametrize("stored", ["bert.", ""], ids=["files with the prefix", "files without"])
@pytest.mark.parametrize("asked", ["bert.", ""], ids=["asked with the prefix", "asked without"])
def test_layers_are_found_with_and_without_the_prefix(tmp_path: Path, stored: str, asked: str) -> None:
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=2
    )
    model = BertForSequenceClassification(config) if stored else BertModel(config)
    model.save_pretrained(tmp_path)
    layer = "encoder.layer.0.attention.self.query"
    checkpoint = opened(tmp_path)
    assert checkpoint.tensor_of(asked + layer) == f"{stored}{layer}.weight"
    assert checkpoint.has_task_head == bool(stored)
    with pytest.raises(InputError, match=r"holds no weight for the layer bert\.encoder\.layer\.9"):
        checkpoint.tensor_of("bert.encoder.layer.9.attention.self.query")


def test_every_change_of_a_tensor_changes_the_digest(base: Path) -> None:
    before = opened(base)
    tensors = safetensors.torch.load_file(base / SINGLE)
    old, tensor = (before.digest, before.tensor_digest(f"{QUERY}.weight")), f"{QUERY}.weight"
    tensors[tensor].view(-1).view(torch.uint8)[5] ^= 1
    safetensors.torch.save_file(tensors, base / SINGLE, {"format": "pt"})
    after = opened(base)
    assert after.digest != old[0] and after.tensor_digest(tensor) != old[1]
    assert after.tensor_digest("classifier.weight") == before.tensor_digest("classifier.weight")


def test_the_dtype_and_the_names_belong_to_the_digest(base: Path) -> None:
    digest = opened(base).digest
    tensors = safetensors.torch.load_file(base / SINGLE)
    for changed in (
        tensors | {"classifier.bias": tensors["classifier.bias"].bfloat16()},
        {("other" if name == "classifier.bias" else name): value for name, value in tensors.items()},
    ):
        safetensors.torch.save_file(changed, base / SINGLE, {"format": "pt"})
        assert opened(base).digest != digest


def test_tampered_weights_do_not_fit_the_basis(base: Path, tiny_basis: Basis) -> None:
    check_basis_fits(opened(base), tiny_basis)
    tensors = safetensors.torch.load_file(base / SINGLE)
    tensors["classifier.bias"] += 1
    safetensors.torch.save_file(tensors, base / SINGLE, {"format": "pt"})
    check_basis_fits(opened(base), tiny_basis)
    for target in tiny_basis.targets:
        tensors[f"{target.name}.weight"][0, 0] += 1e-3
    safetensors.torch.save_file(tensors, base / SINGLE, {"format": "pt"})
    with pytest.raises(BasisMismatchError, match=r"4 of 4 targets differ \(.*query.*, \.\.\.\)"):
        check_basis_fits(opened(base), tiny_basis)


def test_a_basis_of_other_layers_does_not_fit(tiny_base: Path, tiny_basis: Basis) -> None:
    wrong = replace(tiny_basis.targets[0], name="bert.encoder.layer.9.attention.self.query")
    with pytest.raises(InputError, match="holds no weight for the layer"):
        check_basis_fits(opened(tiny_base), replace(tiny_basis, targets=(wrong,)))


def test_a_missing_folder_or_config_is_named(base: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(str(base / "none"))
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(str(base / SINGLE))
    (base / "config.json").unlink()
    with pytest.raises(InputError, match="not a checkpoint: it holds no config.json"):
        opened(base)


@pytest.mark.parametrize("name", ["acme/no-such-model", "no-such-model", "a b"])
def test_hub_names_that_cannot_be_reached_are_one_line(name: str) -> None:
    with pytest.raises(InputError, match="neither a folder nor a reachable hub repository") as caught:
        open_checkpoint(name)
    assert "\n" not in str(caught.value)


def test_a_name_that_the_system_refuses_is_one_line() -> None:
    with pytest.raises(InputError, match="is no name of a checkpoint: File name too long"):
        open_checkpoint("x" * 300)


def test_only_safetensors_are_read(base: Path) -> None:
    (base / SINGLE).rename(base / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds no model.safetensors; only safetensors checkpoints are read"):
        opened(base).digest  # noqa: B018


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": 3}', "\udcff"])
def test_a_damaged_index_is_refused(base: Path, text: str) -> None:
    (base / SINGLE).rename(base / "model-1.safetensors")
    (base / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FileFormatError, match="is damaged"):
        opened(base).shards  # noqa: B018


@pytest.mark.parametrize("name", ["none.safetensors", "../base/model.safetensors", "/etc/passwd", ".."])
def test_shards_that_are_missing_or_outside_are_refused(base: Path, name: str) -> None:
    (base / SINGLE).rename(base / "model-1.safetensors")
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": name}}))
    with pytest.raises(InputError, match="names files that are not there"):
        opened(base).shards  # noqa: B018


@pytest.mark.parametrize("length", [0, 4, 500, -1])
def test_a_cut_file_is_refused(base: Path, length: int) -> None:
    whole = (base / SINGLE).read_bytes()
    (base / SINGLE).write_bytes(whole[:length])
    with pytest.raises(FileFormatError, match="not a complete safetensors file"):
        opened(base).digest  # noqa: B018


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["NoSuchModel"]}, "no architecture 'NoSuchModel'"),
        ({"architectures": []}, 'names no architectures; add "architectures": \\["BertForSequenceClassification"\\]'),
        ({"architectures": None}, "names no architectures"),
        ({"model_type": "no-such-type"}, "cannot be used"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(base: Path, changes: dict, message: str) -> None:
    config = json.loads((base / "config.json").read_text()) | changes
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message) as caught:
        opened(base).architecture  # noqa: B018
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_that_is_no_json_is_named(base: Path) -> None:
    (base / "config.json").write_text("{")
    with pytest.raises(FileFormatError, match=r"config\.json is not valid JSON"):
        opened(base).config  # noqa: B018


def test_a_missing_tokenizer_is_named(base: Path) -> None:
    for path in base.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="holds no usable tokenizer"):
        opened(base).tokenizer()


@pytest.mark.parametrize(
    ("changes", "task"),
    [
        ({"id2label": {"0": "score"}, "label2id": {"score": 0}}, "text-regression"),
        ({"problem_type": "single_label_classification"}, "text-classification"),
    ],
)
def test_the_task_follows_the_config(base: Path, changes: dict, task: str) -> None:
    config = json.loads((base / "config.json").read_text()) | changes
    (base / "config.json").write_text(json.dumps(config))
    assert opened(base).task == task
