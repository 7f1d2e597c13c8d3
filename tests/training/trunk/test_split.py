"""The trunk: parts answer as the whole, the cache holds what the trunk gave, and no more than it may."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from qrlora_deploy.errors import InputError
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.training.trunk import memory as trunk_memory
from qrlora_deploy.training.trunk.cache import fill_cache
from qrlora_deploy.training.trunk.memory import Room, find_room
from qrlora_deploy.training.trunk.split import SplitModel, split_model
from tests.tolerances import FP32_SIDE_BRANCH

WIDE = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
NAMED = WIDE | {"num_labels": 3, "pad_token_id": 1}
MODELS: dict[str, tuple[Any, Any, str]] = {
    "bert": (BertForSequenceClassification, BertConfig(**NAMED), "query"),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**NAMED), "query"),
    "mpnet": (MPNetForSequenceClassification, MPNetConfig(**NAMED), "q"),
    "distilbert": (
        DistilBertForSequenceClassification,
        DistilBertConfig(vocab_size=90, dim=32, n_layers=4, n_heads=4, hidden_dim=48, num_labels=3, pad_token_id=1),
        "q_lin",
    ),
    "llama": (LlamaForSequenceClassification, LlamaConfig(**NAMED), "q_proj"),
    "gpt2": (
        GPT2ForSequenceClassification,
        GPT2Config(vocab_size=90, n_embd=32, n_layer=4, n_head=4, num_labels=3, pad_token_id=1),
        "c_attn",
    ),
}


def build(name: str) -> tuple[Any, str]:
    """A seeded model with weights large enough that every position and mask matters, and its query's name."""
    make, config, query = MODELS[name]
    torch.manual_seed(0)
    model = make(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, query


def batch_of(side: str) -> dict[str, torch.Tensor]:
    """Five rows of 3 to 11 tokens."""
    torch.manual_seed(1)
    lengths, length = (11, 3, 7, 5, 9), 11
    ids, mask = torch.ones(5, length, dtype=torch.int64), torch.zeros(5, length, dtype=torch.int64)
    for row, count in enumerate(lengths):
        part = slice(0, count) if side == "right" else slice(length - count, length)
        ids[row, part], mask[row, part] = torch.randint(2, 90, (count,)), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_the_parts_answer_as_the_whole(name: str, side: str) -> None:
    model, query = build(name)
    batch = batch_of(side)
    whole = model(**batch).logits
    for last in (4, 2, 1):
        split = split_model(model, choose_targets(model, [query], last))
        assert split.first == 4 - last
        model.train()
        hidden = split.trunk(batch)
        assert model.training and not hidden.requires_grad and hidden.shape == (5, 11, 32)
        model.eval()
        torch.testing.assert_close(split.upper(hidden, batch), whole, **FP32_SIDE_BRANCH)
        assert not torch.allclose(split.upper(torch.zeros_like(hidden), batch), whole, atol=1e-2)
    torch.testing.assert_close(model(**batch).logits, whole, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", MODELS)
def test_padding_that_changes_an_answer_is_refused(name: str) -> None:
    model, query = build(name)
    targets = choose_targets(model, [query], 2)
    if name == "llama":
        # It counts positions relatively and reads the last token that is none of padding.
        assert split_model(model, targets, "left").first == 2
    else:
        with pytest.raises(InputError, match="cannot be split: .* padd(ing|ed) on the left"):
            split_model(model, targets, "left")


def test_what_cannot_be_split_is_refused_and_left_as_it_was() -> None:
    model, _ = build("bert")
    with pytest.raises(InputError, match="BertForSequenceClassification cannot be split: .* in 0 lists"):
        split_model(model, ["bert.pooler.dense"])
    mixed = Gemma2ForSequenceClassification(Gemma2Config(**NAMED, num_key_value_heads=4, head_dim=8))
    with pytest.raises(InputError, match="no plain list of one kind"):
        split_model(mixed, ["model.layers.2.self_attn.q_proj"])

    blocks = model.bert.encoder.layer

    class Counting(nn.Module):
        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return last(hidden_states * len(model.bert.encoder.layer), *args, **kwargs)

    last, blocks[3] = blocks[3], Counting()
    with pytest.raises(InputError, match="its parts do not answer as the whole does"):
        split_model(model, ["bert.encoder.layer.2.attention.self.query"])
    assert model.bert.encoder.layer is blocks and len(blocks) == 4 and not blocks[2]._forward_pre_hooks


def test_a_target_before_the_blocks_is_refused() -> None:
    model, _ = build("bert")
    model.bert.embeddings.LayerNorm = nn.Linear(32, 32)
    with pytest.raises(InputError, match="bert.embeddings.LayerNorm comes before the blocks"):
        split_model(model, ["bert.embeddings.LayerNorm", "bert.encoder.layer.2.attention.self.query"])


def rows_of(batch: dict[str, torch.Tensor]) -> list[dict[str, list[int]]]:
    """The rows without their padding."""
    return [
        {"input_ids": ids[mask.bool()].tolist()}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def pad(rows: list[Any], side: str = "right") -> dict[str, torch.Tensor]:
    """A collator."""
    length = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.ones(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    for row, values in enumerate(rows):
        count = len(values["input_ids"])
        part = slice(0, count) if side == "right" else slice(length - count, length)
        ids[row, part], mask[row, part] = torch.tensor(values["input_ids"]), 1
    return {"input_ids": ids, "attention_mask": mask}


def split_of(name: str) -> SplitModel:
    model, query = build(name)
    return split_model(model, choose_targets(model, [query], 2))


@pytest.mark.parametrize(
    ("name", "side"), [("bert", "right"), ("mpnet", "right"), ("llama", "right"), ("llama", "left")]
)
@pytest.mark.parametrize("place", ["host", "disk"])
def test_the_cache_holds_what_the_trunk_gave(name: str, side: str, place: str, tmp_path: Path) -> None:
    split, rows = split_of(name), rows_of(batch_of("right"))
    cache = fill_cache(split, rows, lambda part: pad(part, side), Room(place, tmp_path), tokens_per_batch=20)
    assert list(tmp_path.iterdir()) == [] and len(cache) == 5 and cache.size_bytes == 35 * 32 * 4
    chosen = torch.tensor([3, 0, 2])
    batch = pad([rows[number] for number in chosen], side)
    mask = batch["attention_mask"].bool()
    expected = split.trunk(batch)
    torch.testing.assert_close(cache.padded(chosen, mask)[mask], expected[mask], **FP32_SIDE_BRANCH)
    hidden, lengths = cache.packed(chosen)
    assert lengths.tolist() == [5, 11, 7]
    torch.testing.assert_close(hidden, expected[mask], **FP32_SIDE_BRANCH)
    rectangle, again = cache.rectangle(chosen, 16)
    assert torch.equal(rectangle.view(3, 16, 32)[torch.arange(16) < again[:, None]], hidden)
    logits = split.upper(cache.padded(chosen, mask), batch)
    torch.testing.assert_close(logits, split.model(**batch).logits, **FP32_SIDE_BRANCH)


def test_room_is_found_within_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"device": 100, "host": 1000, "disk": 10_000 * 2**20}
    monkeypatch.setattr(trunk_memory, "free_bytes", lambda place, device, folder: free[place])
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    found = [find_room("auto", size, cuda, tmp_path).place for size in (50, 51, 500, 501)]
    assert found == ["device", "host", "host", "disk"]
    assert find_room("auto", 50, cpu, tmp_path) == find_room("device", 50, cpu, tmp_path) == Room("host", tmp_path)
    assert find_room("disk", 30, cuda, tmp_path, budget_bytes=30).place == "disk"
    with pytest.raises(InputError, match="more than the 0 MiB that may be used .disk.; use another place, or off"):
        find_room("auto", 31, cuda, tmp_path, budget_bytes=30)
    with pytest.raises(InputError, match="2 MiB of hidden states are more than the 0 MiB that may be used .host."):
        find_room("host", 2 * 2**20, cpu, tmp_path)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk_memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert trunk_memory.free_bytes("host", torch.device("cpu"), tmp_path) == 3000
