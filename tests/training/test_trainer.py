"""Training a customer: it learns, repeats itself, resumes, leaves the base alone, and never falls back silently."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError, ProviderError, QrloraError
from qrlora_deploy.formats.basis import Basis, read_basis
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients, write_coefficients
from qrlora_deploy.io.files import digest_file
from qrlora_deploy.models.adapter import attach, set_coefficients
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.training.loop import SmallTrainer
from qrlora_deploy.training.settings import TrainSettings
from qrlora_deploy.training.trainer import train
from tests.tiny import LABELS, SENTENCES

ROOT = Path(__file__).parents[2]
EXAMPLES = Examples(list(SENTENCES[:4]) * 4, None, list(LABELS) * 4, "tiny")
FLIPPED = Examples(EXAMPLES.texts, None, ["banking", "home", "travel", "kitchen"] * 4, "flipped")
"""What is learned from EXAMPLES makes the score on these worse again."""
SETTINGS = {"epochs": 6, "batch_size": 4, "max_length": 16, "learning_rate": 0.1}


def test_it_learns_repeats_itself_and_leaves_the_base(tiny_base: Path, tiny_basis: Basis, tmp_path: Path) -> None:
    checkpoint, before = open_checkpoint(str(tiny_base)), digest_file(tiny_base / "model.safetensors")
    settings = TrainSettings(device="cpu", **SETTINGS)  # type: ignore[arg-type]
    one, two = (train(checkpoint, tiny_basis, EXAMPLES, EXAMPLES, settings, tmp_path / name) for name in "ab")
    np.testing.assert_array_equal(one.values, two.values)
    assert one.values.any() and one.head == {} and one.labels == LABELS
    assert one.training["metrics"]["accuracy"] > one.training["baseline"]["accuracy"]
    assert digest_file(tiny_base / "model.safetensors") == before
    one.check_fits(tiny_basis)


def test_cuda_where_there_is_none_is_refused(
    tiny_base: Path, tiny_basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = TrainSettings(device="cuda", **SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(ProviderError, match="device='cuda'"):
        train(open_checkpoint(str(tiny_base)), tiny_basis, EXAMPLES, None, settings, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def settings_of(**changes: object) -> TrainSettings:
    return TrainSettings(**{"device": "cpu"} | SETTINGS | changes)  # type: ignore[arg-type]


CHILD = """
import sys, time
from pathlib import Path
from qrlora_deploy.formats.basis import read_basis
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.training.trainer import train
from tests.training.test_trainer import EXAMPLES, settings_of

def progress(description, done, total):
    if (description, done) == ("train", 10):
        print("now", flush=True)
        time.sleep(100)

base, basis, folder = sys.argv[1:]
train(open_checkpoint(base), read_basis(Path(basis)), EXAMPLES, None, settings_of(), Path(folder), progress=progress)
"""


def test_a_killed_run_resumes_to_the_same_bits(tiny_base: Path, tiny_basis_file: Path, tmp_path: Path) -> None:
    checkpoint, basis = open_checkpoint(str(tiny_base)), read_basis(tiny_basis_file)
    whole = train(checkpoint, basis, EXAMPLES, None, settings_of(), tmp_path / "whole")
    command = [sys.executable, "-c", CHILD, str(tiny_base), str(tiny_basis_file), str(tmp_path / "cut")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        process.kill()
    assert said.strip() == b"now" and process.returncode != 0
    # Killed in the third of six epochs: two are on the disk. One that was cut while being written is passed over.
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["checkpoint-8", "settings.json"]
    (tmp_path / "cut" / "checkpoint-12").mkdir()
    (tmp_path / "cut" / "checkpoint-12" / "trainable.safetensors").write_bytes(b"half")
    steps: list[int] = []
    resumed = train(
        checkpoint,
        basis,
        EXAMPLES,
        None,
        settings_of(),
        tmp_path / "cut",
        resume=True,
        progress=lambda description, done, total: steps.append(done) if description == "train" else None,
    )
    assert steps == list(range(9, 25))
    np.testing.assert_array_equal(resumed.values, whole.values)
    assert resumed.training == whole.training


def test_a_moved_run_resumes_with_its_best_epoch_and_its_patience(
    tiny_base: Path, tiny_basis: Basis, tmp_path: Path
) -> None:
    checkpoint, settings = open_checkpoint(str(tiny_base)), settings_of(epochs=20, patience=2)
    whole = train(checkpoint, tiny_basis, EXAMPLES, FLIPPED, settings, tmp_path / "whole")

    def interrupt(description: str, done: int, total: int) -> None:
        if (description, done) == ("train", 9):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(checkpoint, tiny_basis, EXAMPLES, FLIPPED, settings, tmp_path / "cut", progress=interrupt)
    (tmp_path / "cut").rename(tmp_path / "moved")
    resumed = train(checkpoint, tiny_basis, EXAMPLES, FLIPPED, settings, tmp_path / "moved", resume=True)
    np.testing.assert_array_equal(resumed.values, whole.values)
    assert resumed.training == whole.training


def test_an_earlier_run_is_neither_overwritten_nor_resumed_with_other_settings(
    tiny_base: Path, tiny_basis: Basis, tmp_path: Path
) -> None:
    checkpoint, folder = open_checkpoint(str(tiny_base)), tmp_path / "run"
    train(checkpoint, tiny_basis, EXAMPLES, None, settings_of(epochs=1), folder)
    before = {path: digest_file(path) for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="holds an earlier run; continue it by resume=True or remove it"):
        train(checkpoint, tiny_basis, EXAMPLES, None, settings_of(epochs=1), folder)
    with pytest.raises(InputError) as caught:
        train(checkpoint, tiny_basis, FLIPPED, None, settings_of(epochs=2, seed=5), folder, resume=True)
    assert str(caught.value) == (
        f"{folder} holds a run with other settings (data_digest, epochs, seed); "
        "resume with the same ones, or remove the folder"
    )
    assert {path: digest_file(path) for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", ["", "[]", '{"epochs": 1}'])
def test_a_damaged_record_of_a_run_is_one_line(
    tiny_base: Path, tiny_basis: Basis, tmp_path: Path, content: str
) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(InputError, match="damaged|other settings") as caught:
        train(open_checkpoint(str(tiny_base)), tiny_basis, EXAMPLES, None, settings_of(epochs=1), tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_the_best_epoch_is_kept_and_the_run_stops_early(
    tiny_base: Path, tiny_basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []
    evaluate = SmallTrainer.evaluate

    def watched(trainer: SmallTrainer, *args: object, **options: object) -> dict[str, float]:
        result = evaluate(trainer, *args, **options)  # type: ignore[arg-type]
        found.append(round(result["eval_accuracy"], 6))
        return result

    monkeypatch.setattr(SmallTrainer, "evaluate", watched)
    checkpoint = open_checkpoint(str(tiny_base))
    settings = settings_of(epochs=20, patience=2, seed=3, learning_rate=0.05)
    customer = train(checkpoint, tiny_basis, EXAMPLES, FLIPPED, settings, tmp_path / "run")
    baseline, *epochs, final = found
    record = customer.training
    best = epochs.index(max(epochs))
    assert len(epochs) == best + 1 + 2 and epochs[-1] < max(epochs) == final
    assert (record["epochs"], record["steps"]) == (len(epochs), 4 * len(epochs))
    assert record["baseline"]["accuracy"] == baseline and record["metrics"]["accuracy"] == final
    assert accuracy(checkpoint, tiny_basis, customer, FLIPPED) == final


def accuracy(checkpoint: Checkpoint, basis: Basis, customer: Coefficients, examples: Examples) -> float:
    """Of the coefficients alone, put into a fresh model."""
    model = checkpoint.load_model()
    set_coefficients(attach(model, basis), basis, customer.values)
    inputs = checkpoint.tokenizer()(examples.texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        chosen = model(**inputs).logits.argmax(-1).tolist()
    right = [customer.labels[index] == label for index, label in zip(chosen, examples.labels, strict=True)]
    return sum(right) / len(right)


def test_without_evaluation_every_epoch_runs(tiny_base: Path, tiny_basis: Basis, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    customer = train(checkpoint, tiny_basis, EXAMPLES, None, settings_of(epochs=3, patience=1), tmp_path / "run")
    record = customer.training
    assert (record["epochs"], record["steps"], record["evaluation_rows"]) == (3, 12, 0)
    assert record["metrics"] == record["baseline"] == {} and "evaluation_digest" not in record


def test_a_customer_with_other_labels_carries_its_output_layer(
    tiny_base: Path, tiny_basis: Basis, tmp_path: Path
) -> None:
    checkpoint, others = open_checkpoint(str(tiny_base)), Examples(EXAMPLES.texts, None, ["z", "x", "y", "x"] * 4, "o")
    with pytest.raises(InputError, match="o: row 1 .* unknown labels 'x', 'y', 'z'; the head knows 'travel'"):
        train(checkpoint, tiny_basis, others, others, settings_of(), tmp_path / "frozen")
    assert list(tmp_path.iterdir()) == []
    settings = settings_of(head="output", head_learning_rate=0.05, epochs=12)
    customer = train(checkpoint, tiny_basis, others, others, settings, tmp_path / "run")
    assert customer.labels == ("x", "y", "z") and customer.training["baseline"] == {}
    assert customer.training["metrics"]["accuracy"] > 0.5
    write_coefficients(customer, tmp_path / "o.safetensors")
    read = read_coefficients(tmp_path / "o.safetensors")
    assert (read.labels, read.digest) == (customer.labels, customer.digest)
    assert {name: array.shape for name, array in read.head.items()} == {
        "classifier.weight": (3, 32),
        "classifier.bias": (3,),
    }


def test_the_own_head_starts_from_the_base_where_the_labels_are_the_same(
    tiny_base: Path, tiny_basis: Basis, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    settings = settings_of(head="output", head_learning_rate=1e-9, epochs=1)
    customer = train(checkpoint, tiny_basis, EXAMPLES, EXAMPLES, settings, tmp_path / "run")
    assert customer.labels == LABELS and customer.training["baseline"]
    weight = checkpoint.read("classifier.weight").numpy()
    np.testing.assert_allclose(customer.head["classifier.weight"], weight, rtol=0.0, atol=1e-7)


def test_numbers_as_labels_train_a_regression(tiny_base: Path, tiny_basis: Basis, tmp_path: Path) -> None:
    numbers = Examples(EXAMPLES.texts, None, ["0.5", "-1.5", "2", "1.0"] * 4, "numbers")
    settings = settings_of(head="output", head_learning_rate=0.05, epochs=15, patience=15)
    customer = train(open_checkpoint(str(tiny_base)), tiny_basis, numbers, numbers, settings, tmp_path / "run")
    assert (customer.task, customer.labels) == ("text-regression", ("score",))
    assert customer.training["metric"] == "pearson" and customer.training["metrics"]["pearson"] > 0.5
    assert customer.head["classifier.weight"].shape == (1, 32)
    still = settings_of(head="output", head_learning_rate=1e-9, epochs=1)
    customer = train(open_checkpoint(str(tiny_base)), tiny_basis, numbers, None, still, tmp_path / "still")
    assert customer.head["classifier.bias"].tolist() == [pytest.approx(0.5, abs=1e-6)], "the mean of the labels"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "the loss became nan in epoch 1; try a smaller learning_rate"),
        ({"epochs": 1, "batch_size": 16}, "training diverged; try a smaller learning_rate"),
    ],
)
def test_a_learning_rate_that_diverges_is_one_line(
    tiny_base: Path, tiny_basis: Basis, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    settings = settings_of(**{"learning_rate": 1e30} | changes)
    with pytest.raises(QrloraError, match=message) as caught:
        train(open_checkpoint(str(tiny_base)), tiny_basis, EXAMPLES, EXAMPLES, settings, tmp_path / "run")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1


@pytest.mark.gpu
def test_bf16_on_cuda_learns_as_well(tiny_base: Path, tiny_basis: Basis, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    customer = train(checkpoint, tiny_basis, EXAMPLES, EXAMPLES, settings_of(device="cuda"), tmp_path / "run")
    record = customer.training
    assert record["device"] == "cuda" and customer.values.dtype == np.float32
    assert record["metrics"]["accuracy"] > record["baseline"]["accuracy"]
    # The coefficients of a GPU serve on a CPU: bf16 may decide one of the four different texts otherwise.
    assert accuracy(checkpoint, tiny_basis, customer, EXAMPLES) >= record["metrics"]["accuracy"] - 0.25
