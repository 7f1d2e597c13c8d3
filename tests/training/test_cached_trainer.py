"""Training on a cached trunk: it gives what training the whole model gives, and falls back where it must."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
)

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.tasks.base import IGNORED
from qrlora_deploy.tasks.token_classification import TokenClassification
from qrlora_deploy.training.cached_trainer import CachedModel, Texts
from qrlora_deploy.training.settings import TrainSettings
from qrlora_deploy.training.trainer import train
from qrlora_deploy.training.trunk import memory as trunk_memory
from qrlora_deploy.training.trunk.cache import TrunkCache
from qrlora_deploy.training.trunk.padding_free import packed_layout, padded_layout
from qrlora_deploy.training.trunk.split import split_model
from qrlora_deploy.training.trunk.upper import Upper
from tests.tiny import LABELS, SENTENCES, build_tokenizer
from tests.tolerances import FP32_SIDE_BRANCH, Tolerance
from tests.training.trunk.test_split import MODELS, batch_of, build

TRAINED: Tolerance = {"rtol": 1e-4, "atol": 1e-4}
"""Coefficients up to 1 after 15 steps of Adam, which divides by the gradient's size and so carries its last bits along.
1e-5 was seen; dropout or a wrong row shows in the first digit."""

EXAMPLES = Examples(list(SENTENCES) * 3, None, [LABELS[index % 4] for index in range(18)], "tiny")
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def settings_of(**changes: Any) -> TrainSettings:
    return TrainSettings(
        **{"device": "cpu", "epochs": 3, "batch_size": 4, "max_length": 16, "learning_rate": 0.1} | changes
    )


def save(folder: Path, make: Any, config: Any, padding_side: str = "right") -> Checkpoint:
    """A random classifier of another family, with the tokenizer of the tiny base."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    settings = SHAPE | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
    model = make(config(**settings, **names, max_position_embeddings=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    changed = {"padding_side": padding_side, "model_input_names": ["input_ids", "attention_mask"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return open_checkpoint(str(folder))


def basis_of(checkpoint: Checkpoint, query: str, last_layers: int) -> Basis:
    return factorize(checkpoint, choose_targets(checkpoint.skeleton(), [query], last_layers), EnergyShare(0.5))


Trained = Callable[..., Coefficients]


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    """Trains with changed settings, each time in a folder of its own."""

    def run(checkpoint: Checkpoint, basis: Basis, **changes: Any) -> Coefficients:
        folder = tmp_path / "-".join(["run", *(f"{name}={value}" for name, value in changes.items())])
        return train(checkpoint, basis, EXAMPLES, EXAMPLES, settings_of(**changes), folder)

    return run


def check_same(found: Coefficients, expected: Coefficients) -> None:
    """The same training but for the order of sums."""
    assert np.abs(expected.values).max() > 0.1
    np.testing.assert_allclose(found.values, expected.values, **TRAINED)
    assert found.head.keys() == expected.head.keys()
    for name, array in found.head.items():
        np.testing.assert_allclose(array, expected.head[name], **TRAINED)
    own = ("trunk_cache", "loss")
    records = [{n: v for n, v in each.training.items() if n not in own} for each in (found, expected)]
    assert records[0] == records[1]
    assert abs(found.training["loss"] - expected.training["loss"]) < 1e-4


@pytest.mark.parametrize("head", ["frozen", "output"])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_cached_is_as_uncached(tiny_base: Path, tiny_basis: Basis, trained: Trained, place: str, head: str) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    last = basis_of(checkpoint, "query", 1)
    for basis in (tiny_basis, last):
        found = trained(checkpoint, basis, trunk_cache=place, head=head, seed=basis.total_rank)
        whole = trained(checkpoint, basis, trunk_cache="off", head=head, seed=basis.total_rank)
        assert (found.training["trunk_cache"], whole.training["trunk_cache"]) == (place, "off")
        check_same(found, whole)


@pytest.mark.parametrize(
    ("make", "config", "query", "side"),
    [
        (MPNetForSequenceClassification, MPNetConfig, "q", "right"),
        (LlamaForSequenceClassification, LlamaConfig, "q_proj", "right"),
        (LlamaForSequenceClassification, LlamaConfig, "q_proj", "left"),
    ],
)
def test_other_families_and_left_padding(
    trained: Trained, tmp_path: Path, make: Any, config: Any, query: str, side: str
) -> None:
    checkpoint = save(tmp_path / "base", make, config, side)
    basis = basis_of(checkpoint, query, 2)
    found = trained(checkpoint, basis)
    assert found.training["trunk_cache"] == "host"
    check_same(found, trained(checkpoint, basis, trunk_cache="off"))


def test_it_falls_back_and_says_why(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save(tmp_path / "left", MPNetForSequenceClassification, MPNetConfig, "left")
    basis = basis_of(checkpoint, "q", 2)
    found = trained(checkpoint, basis)
    assert found.training["trunk_cache"].startswith("off: MPNetForSequenceClassification cannot be split: ")
    check_same(found, trained(checkpoint, basis, trunk_cache="off"))
    with pytest.raises(InputError, match="^trunk_cache='host': MPNetForSequenceClassification cannot be split: "):
        trained(checkpoint, basis, trunk_cache="host")
    right = save(tmp_path / "right", MPNetForSequenceClassification, MPNetConfig)
    monkeypatch.setattr(trunk_memory, "free_bytes", lambda *_: 2000)
    found = trained(right, basis, seed=1)
    assert found.training["trunk_cache"].startswith("off: 0 MiB of hidden states are more than the 0 MiB")
    with pytest.raises(InputError, match="trunk_cache='disk': .* use another place, or off"):
        trained(right, basis, trunk_cache="disk")


def test_dropout_is_off_unless_it_is_asked_for(tiny_base: Path, tiny_basis: Basis, trained: Trained) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    dropped, still = trained(checkpoint, tiny_basis, dropout=True), trained(checkpoint, tiny_basis)
    assert dropped.training["dropout"] and dropped.training["trunk_cache"] == "off"
    assert not still.training["dropout"]
    assert np.abs(dropped.values - still.values).max() > 0.01
    with pytest.raises(InputError, match="dropout=True changes what the trunk answers .* not with trunk_cache='disk'"):
        settings_of(dropout=True, trunk_cache="disk")
    with pytest.raises(InputError, match="trunk_cache must be one of auto, device, host, disk, off, not ram"):
        settings_of(trunk_cache="ram")


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "distilbert"])
@pytest.mark.parametrize("last", [4, 2, 1])
def test_the_blocks_without_padding_answer_as_the_model_does(name: str, last: int) -> None:
    model, query = build(name)
    batch = batch_of("right")
    mask = batch["attention_mask"].bool()
    split = split_model(model, choose_targets(model, [query], last))
    # From the shortest to the longest, as rows without padding are to be.
    order = mask.sum(1).argsort()
    batch, mask = {name: tensor[order] for name, tensor in batch.items()}, mask[order]
    upper, hidden, lengths = Upper(split), split.trunk(batch), mask.sum(1)
    assert len(packed_layout(lengths).groups) == 2
    hidden.requires_grad_(True)
    padded = torch.nn.functional.pad(hidden, (0, 0, 0, 5)).flatten(0, 1)
    answers = [model(**batch).logits, split.upper(hidden, batch)]
    answers += [upper(hidden[mask], packed_layout(lengths)), upper(padded, padded_layout(lengths, 16))]
    gradients = [torch.autograd.grad((answer**2).sum(), hidden)[0][mask] for answer in answers[1:]]
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], **FP32_SIDE_BRANCH)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], **FP32_SIDE_BRANCH)


def test_another_kind_of_block_is_refused() -> None:
    assert {"llama", "gpt2"} < MODELS.keys()
    for name in ("llama", "gpt2"):
        model, query = build(name)
        split = split_model(model, choose_targets(model, [query], 2))
        with pytest.raises(InputError, match="has blocks of another kind than BERT's"):
            Upper(split)
    model, query = build("bert")
    model.config.is_decoder = model.bert.config.is_decoder = True
    causal = type(model)(model.config).eval()
    with pytest.raises(InputError, match="does not compute as BERT does"):
        Upper(split_model(causal, choose_targets(causal, ["query"], 2)))


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_graphs_on_a_gpu_are_as_the_whole_model(
    tiny_base: Path, tiny_basis: Basis, trained: Trained, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In fp32 on both sides, where a difference is a mistake and not a rounding.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: False)
    checkpoint = open_checkpoint(str(tiny_base))
    found = trained(checkpoint, tiny_basis, device="cuda", trunk_cache=place, head="output")
    assert found.training["trunk_cache"] == place
    check_same(found, trained(checkpoint, tiny_basis, device="cuda", trunk_cache="off", head="output"))


@pytest.mark.parametrize("length", [16, 24])
def test_what_answers_tokens_has_their_logits_in_rows(length: int) -> None:
    sizes = {"vocab_size": 60, "num_labels": 3, "max_position_embeddings": 40}
    torch.manual_seed(0)
    model = BertForTokenClassification(BertConfig(**SHAPE, **sizes)).eval()
    lengths = torch.tensor([3, 9, 16, 9])
    mask = (torch.arange(16) < lengths[:, None]).long()
    batch = {"input_ids": torch.randint(1, 60, (4, 16)) * mask, "attention_mask": mask}
    split = split_model(model, choose_targets(model, ["query"], 2))
    rows = [{"input_ids": batch["input_ids"][row, :count].tolist()} for row, count in enumerate(lengths.tolist())]
    offsets = torch.tensor([0, 3, 12, 28, 37])
    cache = TrunkCache(split.trunk(batch)[mask.bool()], offsets, torch.device("cpu"), "host")
    cached = CachedModel(
        split, Upper(split, of_tokens=True), cache, Texts(rows, lambda _: batch, "right"), TokenClassification()
    )
    with torch.no_grad():
        whole = model(**batch).logits
        numbers = torch.tensor([2, 0, 3, 1])
        found = cached.logits(numbers)
        padded = cached.logits_padded(*cache.rectangle(numbers, length), length)
    targets = torch.where(mask.bool(), torch.randint(0, 3, (4, 16)), IGNORED)[numbers]
    for each in (found, padded):
        kept = cached.beside(each, targets)
        assert kept.shape == (4, 16, 3)
        own = mask[numbers].bool()
        np.testing.assert_allclose(kept[own].numpy(), whole[numbers][own].numpy(), **FP32_SIDE_BRANCH)
        with torch.no_grad():
            expected = model(**{name: tensor[numbers] for name, tensor in batch.items()}, labels=targets).loss
        assert cached.loss(each, targets).item() == pytest.approx(expected.item(), rel=1e-5)
