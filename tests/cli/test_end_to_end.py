"""The whole way through the command line, and the way back without the base."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.numpy
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.cli.running import run, succeed, succeed_here
from tests.tiny import LABELS, SENTENCES, save_base
from tests.tolerances import FP32_ONNX, FP32_SIDE_BRANCH, ONE_ROUNDING

ROWS = [(sentence, LABELS[index % len(LABELS)]) for index, sentence in enumerate(SENTENCES * 4)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, training data and held-out data."""
    folder = tmp_path_factory.mktemp("way")
    save_base(folder / "encoder")
    for name, rows in (("train.tsv", ROWS), ("dev.tsv", ROWS[:6])):
        lines = ["text\tlabel", *("\t".join(row) for row in rows)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def logits_of(folder: Path) -> np.ndarray:
    """What transformers makes of a checkpoint and the six sentences."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def onnx_logits(bundle: Path) -> np.ndarray:
    """What plain ONNX Runtime makes of a bundle and the six sentences."""
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    encoded = AutoTokenizer.from_pretrained(bundle)(list(SENTENCES), padding=True, return_tensors="np")
    return session.run(["logits"], {item.name: encoded[item.name].astype(np.int64) for item in session.get_inputs()})[0]


def test_the_whole_way(place: Path) -> None:
    made = succeed(
        ["warmup", "encoder", "--data", "train.tsv", "--mode", "head", "--epochs", 2, "--max-length", 32, "-o", "base"],
        place,
    )
    assert made["labels"] == sorted(LABELS) or made["labels"] == list(LABELS)

    basis = succeed(["factorize", "base", "--target", "query,value", "--tau", 0.6, "-o", "basis.safetensors"], place)
    assert [target["name"].rsplit(".", 1)[-1] for target in basis["targets"]] == ["query", "value"] * 2
    assert basis["total_rank"] == sum(target["rank"] for target in basis["targets"])
    assert all(target["energy"] >= 0.6 and target["condition"] >= 1 for target in basis["targets"])

    options = ["--basis", "basis.safetensors", "--data", "train.tsv", "--eval", "dev.tsv", "--max-length", 32]
    customer = succeed(["train", "base", *options, "--epochs", 3, "--batch-size", 8, "-o", "acme.safetensors"], place)
    assert customer["training"]["rows"] == len(ROWS)
    assert customer["size_bytes"] == (place / "acme.safetensors").stat().st_size
    values = safetensors.numpy.load_file(place / "acme.safetensors")["coefficients"]
    assert values.shape == (basis["total_rank"],) and np.count_nonzero(values) == len(values)

    for path, kind in (("basis.safetensors", "basis"), ("acme.safetensors", "coefficients"), ("base", "checkpoint")):
        assert succeed_here(["inspect", path], place)["kind"] == kind
    assert run("inspect", "acme.safetensors", "--plot", "acme.png", cwd=place).code == 0
    assert (place / "acme.png").read_bytes().startswith(b"\x89PNG")

    # The base and the basis are found by what the customer's file remembers.
    succeed(["merge", "--coefficients", "acme.safetensors", "-o", "acme"], place)
    change = np.abs(logits_of(place / "acme") - logits_of(place / "base")).max()
    assert change > 100 * FP32_ONNX["atol"], "a customer that changes nothing would hide every mistake below"
    succeed(["merge", "--unmerge", "acme", "--coefficients", "acme.safetensors", "-o", "again"], place)
    np.testing.assert_array_equal(logits_of(place / "again"), logits_of(place / "base"))

    exported = succeed(["export", "--merge", "--coefficients", "acme.safetensors", "-o", "bundle"], place)
    assert exported["kind"] == "merged" and exported["parity"]["max_abs_error"] <= exported["parity"]["bound"]
    np.testing.assert_allclose(onnx_logits(place / "bundle"), logits_of(place / "acme"), **FP32_ONNX)

    assert succeed(["verify", "bundle"], place)["passed"]
    anew = ["verify", "bundle", "--coefficients", "acme.safetensors", "--data", "dev.tsv"]
    assert succeed(anew, place)["passed"]
    assert succeed_here(["inspect", "bundle"], place)["kind"] == "bundle"

    texts = [part for sentence in SENTENCES for part in ("--text", sentence)]
    answers = succeed(["predict", "bundle", *texts], place)
    expected = logits_of(place / "acme")
    labels = AutoModelForSequenceClassification.from_pretrained(place / "acme").config.id2label
    assert [answer["label"] for answer in answers] == [labels[index] for index in expected.argmax(axis=1)]
    found = np.array([answer["logits"] for answer in answers])
    np.testing.assert_allclose(found, expected, **FP32_SIDE_BRANCH)


def test_without_the_base_unmerge_subtracts(place: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    succeed_here(["factorize", "base", "--target", "query", "--rank", 8, "-o", "basis.safetensors"], tmp_path)
    (tmp_path / "train.tsv").write_text((place / "train.tsv").read_text("utf-8"), "utf-8")
    options = ["--basis", "basis.safetensors", "--data", "train.tsv", "--max-length", 32, "--epochs", 1]
    succeed_here(["train", "base", *options, "-o", "acme.safetensors"], tmp_path)
    succeed_here(["merge", "--coefficients", "acme.safetensors", "-o", "acme"], tmp_path)
    before = safetensors.numpy.load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base").rename(tmp_path / "gone")
    report = succeed_here(["merge", "--unmerge", "acme", "--coefficients", "acme.safetensors", "-o", "again"], tmp_path)
    assert report["exact"] is False
    after = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    merged = safetensors.numpy.load_file(tmp_path / "acme" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    # One rounding when merging and one when taking out, each of a number of about this size.
    size = np.maximum(np.abs(before[name]), np.abs(merged[name]))
    assert (np.abs(after[name] - before[name]) <= 2 * ONE_ROUNDING["float32"] * size).all()
    assert np.abs(merged[name] - before[name]).max() > 1e-3
