"""Several labels a row, the whole way through the command line, held against PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qrlora_deploy.formats.coefficients import read_coefficients
from tests.cli.running import run_here, succeed_here
from tests.tiny import SENTENCES, save_base
from tests.tolerances import FP32_ONNX

NAMES = ("money", "people", "travel")
ROWS = [
    (sentence, [name for place, name in enumerate(NAMES) if (index >> place) & 1])
    for index, sentence in enumerate(SENTENCES)
]
OTHER = [(sentence, [name for name in ("new", "old") if name[0] in sentence.split()[-1]]) for sentence in SENTENCES]


def write_rows(path: Path, rows: list[tuple[str, list[str]]]) -> None:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows), "utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warmed-up base, its basis, a customer of the base's head and one with labels of its own."""
    folder = tmp_path_factory.mktemp("several")
    save_base(folder / "encoder")
    (folder / "customers").mkdir()
    write_rows(folder / "train.jsonl", ROWS * 4)
    write_rows(folder / "other.jsonl", OTHER * 4)
    short = ["--max-length", 32, "--batch-size", 8]
    made = succeed_here(["warmup", "encoder", "--data", "train.jsonl", "--epochs", 2, *short, "-o", "base"], folder)
    assert made["task"] == "text-multi-label" and tuple(made["labels"]) == NAMES
    succeed_here(["factorize", "base", "--target", "query,value", "--tau", 0.6, "-o", "basis.safetensors"], folder)
    options = ["--basis", "basis.safetensors", "--epochs", 8, "--learning-rate", 0.2, *short]
    held_out = ["--data", "train.jsonl", "--eval", "train.jsonl"]
    acme = succeed_here(["train", "base", *options, *held_out, "-o", "customers/acme.safetensors"], folder)
    assert set(acme["training"]["metrics"]) == {"f1_micro", "f1_macro", "accuracy"}
    assert acme["training"]["metric"] == "f1_micro" and not acme["training"]["trunk_cache"].startswith("off")
    # One epoch: far from done, so that other thresholds than 0.5 are better.
    tuned = [*options, "--epochs", 1, *held_out, "--tune-thresholds", "-o", "customers/tuned.safetensors"]
    assert "tuned_metrics" in succeed_here(["train", "base", *tuned], folder)["training"]
    own = ["--data", "other.jsonl", "--head", "output"]
    succeed_here(["train", "base", *options, *own, "-o", "customers/bolt.safetensors"], folder)
    bolt = succeed_here(["inspect", "customers/bolt.safetensors"], folder)
    assert bolt["labels"] == ["new", "old"] and bolt["task"] == "text-multi-label"
    return folder


def thresholds_of(folder: Path, name: str) -> list[float]:
    """A customer's thresholds, 0.5 each where it has none."""
    customer = read_coefficients(folder / "customers" / f"{name}.safetensors")
    return list(customer.thresholds) or [0.5] * len(customer.labels)


def probabilities(folder: Path) -> np.ndarray:
    """What transformers makes of a merged checkpoint and the sentences."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.problem_type == "multi_label_classification"
    inputs = AutoTokenizer.from_pretrained(folder)(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        return torch.sigmoid(model(**inputs).logits.double()).numpy()


@pytest.mark.parametrize("name", ["acme", "bolt", "tuned"])
def test_merged_and_switchable_answers_are_those_of_transformers(place: Path, name: str, tmp_path: Path) -> None:
    customer = ["--coefficients", place / "customers" / f"{name}.safetensors"]
    succeed_here(["merge", *customer, "-o", tmp_path / "merged"], place)
    expected = probabilities(tmp_path / "merged")
    names = ("new", "old") if name == "bolt" else NAMES
    cuts = thresholds_of(place, name)
    assert (set(cuts) == {0.5}) == (name != "tuned")
    # Under a name that transformers keeps, and nowhere where there are none.
    kept = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").config
    assert getattr(kept, "qrlora_thresholds", [0.5] * len(names)) == cuts
    succeed_here(["export", "--merge", *customer, "--data", place / "train.jsonl", "-o", tmp_path / name], place)
    if not (place / "all").exists():
        made = succeed_here(["export", "base", "--basis", "basis.safetensors", "--head-labels", 4, "-o", "all"], place)
        assert made["task"] == "text-multi-label" and made["parity"]["label_agreement"] == 1.0
    texts = [part for sentence in SENTENCES for part in ("--text", sentence)]
    served = [["predict", tmp_path / name], ["predict", "all", "--customers", "customers", "--customer", name]]
    for command in served:
        answers = succeed_here([*command, *texts], place)
        found = np.array([answer["logits"] for answer in answers])
        np.testing.assert_allclose(1 / (1 + np.exp(-found)), expected, **FP32_ONNX)
        for answer, row in zip(answers, expected, strict=True):
            assert answer["labels"] == [
                label for label, share, cut in zip(names, row, cuts, strict=True) if share >= cut
            ]
            assert answer["label"] == names[row.argmax()] and answer["score"] == pytest.approx(row.max(), abs=1e-5)
    manifest = json.loads((tmp_path / name / "manifest.json").read_text())
    assert (manifest["thresholds"] or [0.5] * len(names)) == cuts
    assert succeed_here(["verify", tmp_path / name], place)["passed"]
    assert succeed_here(["verify", "all", *customer, "--data", "train.jsonl"], place)["passed"]


def test_each_row_is_decided_by_its_customers_thresholds(place: Path, tmp_path: Path) -> None:
    succeed_here(["export", "base", "--basis", "basis.safetensors", "--head-labels", 4, "-o", tmp_path / "all"], place)
    owners = [("tuned", "acme", "bolt", None)[row % 4] for row in range(len(SENTENCES))]
    requests = [
        {"text": text, **({"customer": owner} if owner else {})} for text, owner in zip(SENTENCES, owners, strict=True)
    ]
    (tmp_path / "requests.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in requests))
    command = ["predict", tmp_path / "all", "--customers", "customers", "--requests", tmp_path / "requests.jsonl"]
    answers = succeed_here(command, place)
    differ = 0
    for owner, answer in zip(owners, answers, strict=True):
        names = ("new", "old") if owner == "bolt" else NAMES
        cuts = thresholds_of(place, owner) if owner else [0.5] * 3
        shares = 1 / (1 + np.exp(-np.array(answer["logits"])))
        expected = [name for name, share, cut in zip(names, shares, cuts, strict=True) if share >= cut]
        assert answer["labels"] == expected
        differ += expected != [name for name, share in zip(names, shares, strict=True) if share >= 0.5]
    assert differ, "no row is decided otherwise than by 0.5, so nothing was shown"
    (tmp_path / "labelled").mkdir()
    write_rows(tmp_path / "labelled" / "tuned.jsonl", ROWS)
    quick = ["--scenario", "single-stream", "--batch", 1, "--length", 8, "--seconds", 0.2, "--samples", 6]
    customers = ["--customers", place / "customers", "--labelled", tmp_path / "labelled"]
    report = succeed_here(["bench", tmp_path / "all", *customers, *quick, "-o", tmp_path / "report"], place)
    succeed_here(["merge", "--coefficients", "customers/tuned.safetensors", "-o", tmp_path / "merged"], place)
    chosen = probabilities(tmp_path / "merged") >= np.array(thresholds_of(place, "tuned"))
    right = [
        {name for name, yes in zip(NAMES, row, strict=True) if yes} == set(label)
        for row, (_, label) in zip(chosen, ROWS, strict=True)
    ]
    assert [item["accuracy"] for item in report["accuracy"]] == [pytest.approx(np.mean(right))]


def test_what_has_thresholds_loses_them_only_where_it_is_said(place: Path, tmp_path: Path) -> None:
    tuned = place / "customers" / "tuned.safetensors"
    assert succeed_here(["inspect", tuned], place)["thresholds"] == thresholds_of(place, "tuned")
    succeed_here(["merge", "--coefficients", tuned, "-o", tmp_path / "merged"], place)
    succeed_here(["merge", "--unmerge", tmp_path / "merged", "--coefficients", tuned, "-o", tmp_path / "base"], place)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (place / "base", tmp_path / "base")]
    assert "qrlora_thresholds" not in configs[1] and configs[0] == configs[1]


def test_accuracy_of_a_bundle_is_the_share_of_rows_that_are_wholly_right(place: Path, tmp_path: Path) -> None:
    customer = ["--coefficients", "customers/acme.safetensors"]
    succeed_here(["merge", *customer, "-o", tmp_path / "merged"], place)
    expected = probabilities(tmp_path / "merged") >= 0.5
    right = [
        {name for name, yes in zip(NAMES, row, strict=True) if yes} == set(label)
        for row, (_, label) in zip(expected, ROWS, strict=True)
    ]
    made = succeed_here(["export", "--merge", *customer, "--data", "train.jsonl", "-o", tmp_path / "acme"], place)
    assert made["parity"]["accuracy"] == made["parity"]["accuracy_reference"] == pytest.approx(np.mean(right))
    (tmp_path / "labelled").mkdir()
    write_rows(tmp_path / "labelled" / "acme.jsonl", ROWS)
    quick = ["--scenario", "single-stream", "--batch", 1, "--length", 8, "--seconds", 0.2, "--samples", 6]
    bench = ["bench", tmp_path / "acme", "--labelled", tmp_path / "labelled", *quick, "-o", tmp_path / "report"]
    report = succeed_here(bench, place)
    assert [item["accuracy"] for item in report["accuracy"]] == [pytest.approx(np.mean(right))]


def test_a_table_of_texts_and_the_line_for_a_person(place: Path, tmp_path: Path) -> None:
    lines = ["text\tlabel", *("\t".join((text, "|".join(label))) for text, label in ROWS if label)]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    options = ["--basis", "basis.safetensors", "--epochs", 1, "--max-length", 32, "-o", tmp_path / "a.safetensors"]
    succeed_here(["train", "base", "--data", tmp_path / "train.tsv", *options], place)
    made = succeed_here(["inspect", tmp_path / "a.safetensors"], place)
    assert made["task"] == "text-multi-label"
    shown = run_here("train", "base", "--data", "train.jsonl", "--task", "classification", *options, cwd=place)
    assert shown.code == 2 and "--task classification: the head of base is for text-multi-label" in shown.err
