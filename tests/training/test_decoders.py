"""Training decoders by the command line: it learns, resumes, packs without a change, and refuses what does not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qrlora_deploy as qr
from qrlora_deploy.data.examples import read_examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis, read_basis
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients
from qrlora_deploy.models.adapter import attach, set_coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.training.forward_only import check_reads_forward
from qrlora_deploy.training.settings import TrainSettings, default_rate
from qrlora_deploy.training.trainer import train
from tests.cli.running import run_here
from tests.tiny import SENTENCES, save_base
from tests.tiny_decoder import save_decoder

WORDS = (" travel", " banking", " home", " kitchen")
PLAIN = [{"prompt": f"{text}\nIntent:", "completion": word} for text, word in zip(SENTENCES, WORDS, strict=False)]
CHATS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": word.strip()}] * turns}
    for turns, (text, word) in enumerate(zip(SENTENCES, WORDS, strict=False), start=1)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder") / "base")


@pytest.fixture(scope="module")
def basis_file(base: Path) -> Path:
    file = base.parent / "basis.safetensors"
    run("factorize", base, "--targets", "q,v", "-o", file)
    return file


@pytest.fixture(scope="module")
def basis(basis_file: Path) -> Basis:
    return read_basis(basis_file)


def run(*arguments: Any) -> str:
    ran = run_here(*arguments, cwd=Path.cwd())
    assert ran.code == 0, ran.err
    return ran.out


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("rows", [PLAIN, CHATS], ids=["prompts", "chats"])
def test_the_commands_train_merge_and_export(rows: list[Any], base: Path, basis_file: Path, tmp_path: Path) -> None:
    data, file = lines(tmp_path / "a.jsonl", rows), tmp_path / "acme.safetensors"
    options = ("--basis", basis_file, "--data", data, "--eval", data, "--epochs", 12, "--batch-size", 2, "--json")
    record = json.loads(run("train", base, *options, "-o", file))["training"]
    assert record["metric"] == "nll" and tuple(record["metrics"]) == ("nll", "exact_match", "token_accuracy")
    assert record["metrics"]["nll"] < record["baseline"]["nll"] - 1
    customer, frozen = read_coefficients(file), read_basis(basis_file)
    assert (customer.task, customer.labels, customer.head) == ("text-generation", (), {}) and customer.values.any()
    # The metrics are those of transformers' own forward with the customer.
    assert record["metrics"]["nll"] == pytest.approx(own_loss(base, frozen, customer, data), rel=1e-4)
    run("merge", base, "--basis", basis_file, "--coefficients", file, "-o", tmp_path / "merged")
    run("export", base, "--format", "peft", "--basis", basis_file, "--coefficients", file, "-o", tmp_path / "lora")
    assert "text-generation" in run("inspect", base) and "text-generation" in run("inspect", file)


def own_loss(base: Path, basis: Basis, customer: Coefficients, data: Path) -> float:
    """Mean over answer tokens, each found by hand from the text in which the tokenizer's template writes the chat."""
    checkpoint = open_checkpoint(str(base))
    model, tokenizer = checkpoint.load_model(), checkpoint.tokenizer()
    set_coefficients(attach(model, basis), basis, customer.values)
    total, count = 0.0, 0
    for turns in read_examples(data).turns or ():
        if turns[-1].role == "completion":
            parts = [(turns[0].content, False), (turns[1].content + "<|im_end|>", True)]
        else:
            parts = []
            for turn in turns:
                parts.append((f"<|im_start|>{turn.role}\n", False))
                parts.append((f"{turn.content}<|im_end|>", turn.role == "assistant"))
                parts.append(("\n", False))
        ids, labels = [], []
        for text, wanted in parts:
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += own
            labels += own if wanted else [-100] * len(own)
        answered = sum(label != -100 for label in labels)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total, count = total + float(loss) * answered, count + answered
    return total / count


def train_on(base: Path, basis: Basis, rows: list[Any], folder: Path, **settings: Any) -> Coefficients:
    data = read_examples(lines(folder / "a.jsonl", rows))
    chosen = TrainSettings(**{"epochs": 3, "batch_size": 4, "device": "cpu"} | settings)
    return train(open_checkpoint(str(base)), basis, data, None, chosen, folder / "run")


def test_packing_changes_nothing_but_the_layout(base: Path, basis: Basis, tmp_path: Path) -> None:
    found = []
    for packing in (False, True):
        folder = tmp_path / str(packing)
        folder.mkdir()
        found.append(train_on(base, basis, PLAIN, folder, packing=packing, learning_rate=0.01))
    np.testing.assert_allclose(found[1].values, found[0].values, rtol=1e-3, atol=1e-5)
    assert found[0].values.any() and found[1].training["packing"] is True and "packing" not in found[0].training


CACHED = [("Llama", "fp32", True), ("GPT2", "fp32", False), ("Qwen3", "bf16", True)]


@pytest.mark.parametrize(("kind", "dtype", "packing"), CACHED)
def test_a_cached_trunk_changes_nothing(kind: str, dtype: str, packing: bool, tmp_path: Path) -> None:
    base = save_decoder(tmp_path / "base", kind, num_hidden_layers=4, **({"head_dim": 8} if kind == "Qwen3" else {}))
    checkpoint, basis = open_checkpoint(str(base)), qr.factorize(base, last_layers=2)
    assert {target.name.split(".")[2] for target in basis.targets} == {"2", "3"}
    data = read_examples(lines(tmp_path / "a.jsonl", CHATS + CHATS))
    chosen = {"learning_rate": 0.02, "base_dtype": dtype, "packing": packing}
    found = []
    for place in ("disk", "off"):
        settings = TrainSettings(epochs=3, batch_size=3, device="cpu", trunk_cache=place, **chosen)
        found.append(train(checkpoint, basis, data, data, settings, tmp_path / place))
        assert found[-1].training["trunk_cache"] == place
    cached, whole = (customer.values for customer in found)
    assert np.abs(cached).max() > 0.01
    # In bf16 a row rounds otherwise beside other rows than alone, which the cache holds.
    near = {"atol": 2e-5, "rtol": 1e-4} if dtype == "fp32" else {"atol": 0.2 * np.abs(whole).max(), "rtol": 0}
    np.testing.assert_allclose(cached, whole, **near)
    scores = [customer.training["metrics"]["nll"] for customer in found]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4 if dtype == "fp32" else 0.05)


def test_a_base_in_bf16_trains_fp32_coefficients_near_those_in_fp32(base: Path, basis: Basis, tmp_path: Path) -> None:
    found = []
    for dtype in ("fp32", "bf16"):
        folder = tmp_path / dtype
        folder.mkdir()
        found.append(train_on(base, basis, PLAIN, folder, base_dtype=dtype, learning_rate=0.01))
    one, other = (customer.values for customer in found)
    assert other.dtype == np.float32 and (one != other).any()
    assert np.dot(one, other) > 0.8 * np.linalg.norm(one) * np.linalg.norm(other)


def test_an_interrupted_run_resumes_to_the_same_bits(base: Path, basis: Basis, tmp_path: Path) -> None:
    data = read_examples(lines(tmp_path / "a.jsonl", CHATS))
    settings = TrainSettings(epochs=4, batch_size=2, device="cpu", packing=True)
    checkpoint = open_checkpoint(str(base))
    whole = train(checkpoint, basis, data, data, settings, tmp_path / "whole")

    def stop(description: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(checkpoint, basis, data, data, settings, tmp_path / "cut", progress=stop)
    resumed = train(checkpoint, basis, data, data, settings, tmp_path / "cut", resume=True)
    np.testing.assert_array_equal(resumed.values, whole.values)


def test_the_default_rate_is_three_times_that_of_classifiers(base: Path, basis: Basis, tmp_path: Path) -> None:
    found = train_on(base, basis, PLAIN, tmp_path, epochs=1)
    assert found.training["learning_rate"] == default_rate(basis.total_rank, 3.0)
    assert default_rate(27_165, 3.0) == pytest.approx(0.0502) and default_rate(27_165) == pytest.approx(0.0167)


def test_what_does_not_fit_is_refused(base: Path, basis: Basis, tmp_path: Path) -> None:
    labelled = [{"text": text, "label": word} for text, word in zip(SENTENCES, WORDS, strict=False)]
    with pytest.raises(InputError, match="its rows have labels, a text-generation needs answers"):
        train_on(base, basis, labelled, tmp_path)
    with pytest.raises(InputError, match="trunk_cache='host': the first block of LlamaForCausalLM is adapted, and"):
        train_on(base, basis, PLAIN, tmp_path, trunk_cache="host")
    with pytest.raises(InputError, match="a decoder keeps its own head"):
        train_on(base, basis, PLAIN, tmp_path, head="output")
    plain = save_decoder(tmp_path / "plain", template=None)
    with pytest.raises(InputError, match=r"holds chats, but the base's tokenizer has no chat template; give prompts"):
        train_on(plain, qr.factorize(plain), CHATS, tmp_path)
    encoder = save_base(tmp_path / "encoder")
    with pytest.raises(InputError, match=r"its rows are prompts and answers, a text-classification needs texts"):
        train_on(encoder, qr.factorize(encoder), PLAIN, tmp_path)
    with pytest.raises(InputError, match="packing=True is for prompts with answers; rows of text-classification"):
        train_on(encoder, qr.factorize(encoder), labelled, tmp_path, packing=True)


def test_a_model_that_sees_what_it_is_to_write_is_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    rows = [{"input_ids": [5, 6, 7, 8, 9, 10], "labels": [5, 6, 7, 8, 9, 10]}]
    with pytest.raises(InputError, match="BertLMHeadModel sees the tokens that it is to write: it is no decoder"):
        check_reads_forward(BertLMHeadModel(config).eval(), rows, packed=False)


def test_labels_are_judged_by_their_likelihoods(base: Path, basis: Basis, tmp_path: Path) -> None:
    data = read_examples(lines(tmp_path / "a.jsonl", PLAIN * 2))
    settings = TrainSettings(epochs=2, batch_size=4, device="cpu")
    checkpoint = open_checkpoint(str(base))
    found = train(checkpoint, basis, data, data, settings, tmp_path / "run")
    model, tokenizer = checkpoint.load_model(), checkpoint.tokenizer()
    adapters = attach(model, basis)
    for values, stored in (
        (np.zeros(basis.total_rank, np.float32), found.training["baseline"]),
        (found.values, found.training["metrics"]),
    ):
        set_coefficients(adapters, basis, values)
        right = 0
        for row in PLAIN:
            scores = {}
            for word in WORDS:
                prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + word))
                ids = torch.tensor([[*whole, tokenizer.eos_token_id]])
                with torch.no_grad():
                    known = torch.log_softmax(model(input_ids=ids).logits[0].double(), 1)
                scores[word] = sum(float(known[place - 1, ids[0, place]]) for place in range(len(prompt), ids.shape[1]))
            right += max(scores, key=lambda word: scores[word]) == row["completion"]
        assert stored["label_accuracy"] == right / 4


def test_answers_that_are_no_labels_are_not_judged_as_such(base: Path, basis: Basis, tmp_path: Path) -> None:
    data = read_examples(lines(tmp_path / "a.jsonl", PLAIN))
    settings = TrainSettings(epochs=1, device="cpu")
    found = train(open_checkpoint(str(base)), basis, data, data, settings, tmp_path / "run")
    assert "label_accuracy" not in found.training["metrics"]
