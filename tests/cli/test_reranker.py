"""A reranker the whole way through the command line, held against PyTorch: a warmed-up base, and one from the hub."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from tests.cli.running import run_here, succeed_here
from tests.tiny import SENTENCES, save_base
from tests.tolerances import FP32_ONNX

PAIRS = [(first, second) for first in SENTENCES for second in SENTENCES]
LABELS = [int(first[0] == second[0] or len(first) > len(second)) for first, second in PAIRS]
SHORT = ["--max-length", 48, "--batch-size", 8]


def write_rows(path: Path, labels: list[float]) -> None:
    lines = ["text\ttext_pair\tlabel", *(f"{a}\t{b}\t{label}" for (a, b), label in zip(PAIRS, labels, strict=True))]
    path.write_text("\n".join(lines) + "\n", "utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases and a customer of each: "base" by warm-up, "hub" with one output of which its config says nothing."""
    folder = tmp_path_factory.mktemp("ranking")
    save_base(folder / "encoder")
    save_base(folder / "hub", labels=("LABEL_0",))
    assert json.loads((folder / "hub" / "config.json").read_text()).get("problem_type") is None
    write_rows(folder / "train.tsv", LABELS)
    warm = ["warmup", "encoder", "--data", "train.tsv", "--task", "reranker", "--epochs", 2, *SHORT, "-o", "base"]
    assert succeed_here(warm, folder)["task"] == "text-ranking"
    for base in ("base", "hub"):
        (folder / f"{base}-customers").mkdir()
        made = ["--target", "query,value", "--tau", 0.6, "-o", f"{base}-basis.safetensors"]
        succeed_here(["factorize", base, *made], folder)
        options = ["--basis", f"{base}-basis.safetensors", "--epochs", 6, "--learning-rate", 0.2, *SHORT]
        data = ["--data", "train.tsv", "--eval", "train.tsv", "--task", "reranker"]
        acme = succeed_here(["train", base, *options, *data, "-o", f"{base}-customers/acme.safetensors"], folder)
        record = acme["training"]
        assert set(record["metrics"]) == {"average_precision", "accuracy", "spearman"}
        assert record["metric"] == "average_precision" and not record["trunk_cache"].startswith("off")
        assert record["metrics"]["average_precision"] > record["baseline"]["average_precision"]
    return folder


def probabilities(folder: Path) -> np.ndarray:
    """What transformers makes of a merged checkpoint and the pairs."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.problem_type is None and model.config.num_labels == 1
    firsts, seconds = ([pair[side] for pair in PAIRS] for side in (0, 1))
    inputs = AutoTokenizer.from_pretrained(folder)(firsts, seconds, padding=True, return_tensors="pt")
    with torch.no_grad():
        return torch.sigmoid(model(**inputs).logits.double()).numpy()[:, 0]


@pytest.mark.parametrize("base", ["base", "hub"])
def test_merged_and_switchable_scores_are_those_of_transformers(place: Path, base: str, tmp_path: Path) -> None:
    customers = place / f"{base}-customers"
    customer = ["--coefficients", customers / "acme.safetensors"]
    succeed_here(["merge", *customer, "-o", tmp_path / "merged"], place)
    expected = probabilities(tmp_path / "merged")
    right = np.mean((expected >= 0.5) == np.array(LABELS))
    made = succeed_here(["export", "--merge", *customer, "--data", "train.tsv", "-o", tmp_path / "acme"], place)
    assert made["task"] == "text-ranking" and made["parity"]["accuracy"] == pytest.approx(right)
    basis = ["--basis", f"{base}-basis.safetensors"]
    named = ["--task", "reranker"] if base == "hub" else []
    assert succeed_here(["export", base, *basis, *named, "-o", tmp_path / "all"], place)["task"] == "text-ranking"
    pairs = [part for first, second in PAIRS for part in ("--text", first, "--pair", second)]
    for bundle in (["acme"], ["all", "--customers", customers, "--customer", "acme"]):
        answers = succeed_here(["predict", tmp_path / bundle[0], *bundle[1:], *pairs], place)
        np.testing.assert_allclose([answer["score"] for answer in answers], expected, **FP32_ONNX)
        assert [bool(answer["labels"]) for answer in answers] == list(expected >= 0.5)
    assert succeed_here(["verify", tmp_path / "acme"], place)["passed"]
    assert succeed_here(["verify", tmp_path / "all", *customer, "--data", "train.tsv"], place)["passed"]
    alone = run_here("predict", tmp_path / "acme", "--text", SENTENCES[0], cwd=place)
    assert alone.code == 2 and "scores pairs of texts; give the second texts too" in alone.err


@pytest.mark.parametrize("base", ["base", "hub"])
def test_the_task_survives_a_round_trip_and_goes_with_the_merge(place: Path, base: str, tmp_path: Path) -> None:
    customer = ["--coefficients", place / f"{base}-customers" / "acme.safetensors"]
    succeed_here(["merge", *customer, "-o", tmp_path / "merged"], place)
    AutoConfig.from_pretrained(tmp_path / "merged").save_pretrained(tmp_path / "again")
    for folder in ("merged", "again"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["qrlora_task"] == "text-ranking"
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "pipeline_tag: text-ranking" in card and "Task: text-ranking" in card
    basis = ["--basis", place / f"{base}-basis.safetensors", *customer]
    succeed_here(["merge", "--unmerge", tmp_path / "merged", *basis, "-o", tmp_path / "restored"], place)
    before, after = (json.loads((at / "config.json").read_text()) for at in (place / base, tmp_path / "restored"))
    assert before == after


def test_accuracy_of_a_bundle_is_the_share_of_right_decisions(place: Path, tmp_path: Path) -> None:
    customer = ["--coefficients", "base-customers/acme.safetensors"]
    made = succeed_here(["export", "--merge", *customer, "--data", "train.tsv", "-o", tmp_path / "acme"], place)
    (tmp_path / "labelled").mkdir()
    write_rows(tmp_path / "labelled" / "acme.tsv", LABELS)
    quick = ["--scenario", "single-stream", "--batch", 1, "--length", 8, "--seconds", 0.2, "--samples", 6]
    bench = ["bench", tmp_path / "acme", "--labelled", tmp_path / "labelled", *quick, "-o", tmp_path / "report"]
    report = succeed_here(bench, place)
    assert [item["accuracy"] for item in report["accuracy"]] == [pytest.approx(made["parity"]["accuracy"])]


def test_what_does_not_fit_is_refused_in_one_line(place: Path, tmp_path: Path) -> None:
    basis = ["--basis", "base-basis.safetensors", "-o", tmp_path / "out"]
    train = ["train", "base", "--basis", "base-basis.safetensors", "-o", tmp_path / "c.safetensors", "--data"]
    other = run_here(*train, "train.tsv", "--task", "classification", cwd=place)
    assert other.code == 2 and "--task classification: the head of base is for text-ranking" in other.err
    wrong = run_here("export", "base", *basis, "--task", "multi-label", cwd=place)
    assert wrong.code == 2 and "--task multi-label: the head of base is for text-ranking" in wrong.err
    (tmp_path / "single.tsv").write_text("text\tlabel\na\t1\nb\t0\n", "utf-8")
    single = run_here(*train, tmp_path / "single.tsv", cwd=place)
    assert single.code == 2 and "single.tsv holds single texts; --task reranker needs pairs" in single.err
    (tmp_path / "graded.tsv").write_text("text\ttext_pair\tlabel\na\tb\t2\n", "utf-8")
    graded = run_here(*train, tmp_path / "graded.tsv", cwd=place)
    # Another head would not take such a label either, so none is offered.
    assert graded.code == 2 and "not '2'; --task regression takes others" in graded.err and "--head" not in graded.err
