"""Warm-up: a new checkpoint with its head and tokenizer, the old one untouched, nothing after a failure."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError, ProviderError, QrloraError
from qrlora_deploy.io.files import digest_file
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.training.settings import WarmupSettings
from qrlora_deploy.training.warmup import warmup
from tests.tiny import LABELS, SENTENCES, save_base

EXAMPLES = Examples(list(SENTENCES[:4]) * 4, None, list(LABELS) * 4, "tiny")
OTHERS = Examples(EXAMPLES.texts, None, ["south", "north", "west", "east"] * 4, "others")
NUMBERS = Examples(EXAMPLES.texts, None, ["0.5", "1.5", "2", "-3"] * 4, "numbers")


def settings(**changes: object) -> WarmupSettings:
    values: dict[str, object] = {"epochs": 12, "batch_size": 4, "max_length": 16, "device": "cpu"}
    return WarmupSettings(**values | {"mode": "head", "learning_rate": 0.01} | changes)  # type: ignore[arg-type]


@pytest.fixture
def base(tiny_base: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_base))


@pytest.fixture
def encoder(tmp_path: Path) -> Checkpoint:
    """The tiny base without pooler and head, as pretrained encoders come."""
    folder = save_base(tmp_path / "encoder")
    BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)
    return open_checkpoint(str(folder))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def test_head_mode_leaves_the_encoder_bit_for_bit(base: Checkpoint, tmp_path: Path) -> None:
    before = digest_file(base.folder / "model.safetensors")
    report = warmup(base, EXAMPLES, EXAMPLES, tmp_path / "out", settings())
    old, new = tensors(base.folder), tensors(tmp_path / "out")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if "pooler" in name or "classifier" in name}
    assert report["trained_parameters"] == sum(old[name].numel() for name in changed)
    assert report["metrics"]["accuracy"] > 0.5
    assert digest_file(base.folder / "model.safetensors") == before


def test_full_mode_trains_every_tensor_that_the_texts_reach(base: Checkpoint, tmp_path: Path) -> None:
    report = warmup(base, EXAMPLES, EXAMPLES, tmp_path / "out", settings(mode="full", learning_rate=1e-3))
    old, new = tensors(base.folder), tensors(tmp_path / "out")
    assert [name for name in old if torch.equal(old[name], new[name])] == []
    assert report["trained_parameters"] == sum(value.numel() for value in old.values())
    assert report["metrics"]["accuracy"] > 0.5


def test_thresholds_of_an_earlier_head_are_left_behind(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "merged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"qrlora_thresholds": [0.25] * len(LABELS)}))
    warmup(open_checkpoint(str(folder)), EXAMPLES, None, tmp_path / "out", settings(epochs=1))
    assert "qrlora_thresholds" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_an_encoder_becomes_a_classifier_that_transformers_opens(encoder: Checkpoint, tmp_path: Path) -> None:
    assert not encoder.has_task_head
    out = tmp_path / "out"
    report = warmup(encoder, OTHERS, OTHERS, out, settings())
    assert report == json.loads((out / "warmup.json").read_text())
    assert report["labels"] == ["east", "north", "south", "west"]
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    names = {0: "east", 1: "north", 2: "south", 3: "west"}
    assert model.config.id2label == names and model.config.label2id == {name: key for key, name in names.items()}
    assert open_checkpoint(str(out)).labels == ("east", "north", "south", "west")
    inputs = AutoTokenizer.from_pretrained(out)(OTHERS.texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        chosen = model(**inputs).logits.argmax(-1).tolist()
    right = sum(names[index] == label for index, label in zip(chosen, OTHERS.labels, strict=True))
    assert right / len(OTHERS) == report["metrics"]["accuracy"]


def test_a_head_that_serves_is_kept_with_its_order(base: Checkpoint, tmp_path: Path) -> None:
    some = Examples(EXAMPLES.texts, None, ["kitchen", "home"] * 8, "some")
    report = warmup(base, some, None, tmp_path / "out", settings(epochs=1, learning_rate=1e-9))
    assert report["labels"] == list(LABELS) and report["metrics"] == {}
    old, new = tensors(base.folder), tensors(tmp_path / "out")
    torch.testing.assert_close(new["classifier.weight"], old["classifier.weight"], rtol=0.0, atol=1e-7)


def test_numbers_make_a_regression(base: Checkpoint, tmp_path: Path) -> None:
    report = warmup(base, NUMBERS, NUMBERS, tmp_path / "out", settings())
    assert report["task"] == "text-regression" and report["labels"] == ["score"]
    assert report["metrics"]["pearson"] > 0.5
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_the_bias_of_a_new_regression_starts_at_the_mean_of_its_labels(base: Checkpoint, tmp_path: Path) -> None:
    # One step of a rate of 1e-9 moves nothing that fp32 shows.
    warmup(base, NUMBERS, None, tmp_path / "out", settings(mode="full", epochs=1, learning_rate=1e-9))
    assert tensors(tmp_path / "out")["classifier.bias"].tolist() == [pytest.approx(0.25, abs=1e-6)]
    # A head that serves is kept: other labels do not move its bias.
    again = Examples(NUMBERS.texts, None, ["8.5", "9.5", "7", "9"] * 4, "again")
    served = open_checkpoint(str(tmp_path / "out"))
    warmup(served, again, None, tmp_path / "again", settings(mode="full", epochs=1, learning_rate=1e-9))
    assert tensors(tmp_path / "again")["classifier.bias"].tolist() == [pytest.approx(0.25, abs=1e-6)]


def test_it_repeats_itself(encoder: Checkpoint, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        warmup(encoder, OTHERS, None, tmp_path / name, settings(epochs=1, seed=seed))
    one, two, three = (digest_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "three"))
    assert one == two != three


def test_an_output_that_holds_something_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="already exists"):
        warmup(base, EXAMPLES, None, tmp_path / "out", settings())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("data", "evaluation", "changes", "message"),
    [
        (EXAMPLES, EXAMPLES, {"learning_rate": 1e30}, "the loss became nan in epoch 1"),
        (EXAMPLES, EXAMPLES, {"learning_rate": 1e30, "epochs": 1, "batch_size": 16}, "training diverged"),
        (NUMBERS, NUMBERS, {"learning_rate": 1e30, "epochs": 1, "batch_size": 16}, "training diverged"),
        (EXAMPLES, OTHERS, {}, "unknown labels 'east'"),
        (EXAMPLES, Examples(["a"], ["b"], ["home"], "pairs"), {}, "tiny and pairs: one holds pairs"),
        (Examples(["a", "b"], None, ["same", "same"], "same"), None, {}, "every row has the label same"),
        (EXAMPLES, None, {"max_length": 65}, "max_length=65 is more than the 64 tokens"),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(
    base: Checkpoint,
    tmp_path: Path,
    data: Examples,
    evaluation: Examples | None,
    changes: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(QrloraError, match=message) as caught:
        warmup(base, data, evaluation, tmp_path / "out", settings(mode="full", **changes))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_never_written(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(trainer: object) -> None:
        next(iter(trainer.trainable().values())).data.fill_(float("nan"))  # type: ignore[attr-defined]

    monkeypatch.setattr("qrlora_deploy.training.warmup.SmallTrainer.train", spoil)
    with pytest.raises(QrloraError, match="pooler.dense.weight is NaN or Inf; try a smaller learning_rate"):
        warmup(base, EXAMPLES, None, tmp_path / "out", settings())
    assert list(tmp_path.iterdir()) == []


def test_cuda_where_there_is_none_is_refused(base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ProviderError, match="device='cuda'"):
        warmup(base, EXAMPLES, None, tmp_path / "out", settings(device="cuda"))
    assert list(tmp_path.iterdir()) == []
