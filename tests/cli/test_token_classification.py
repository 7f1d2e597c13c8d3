"""Tags of words, the whole way through the command line, held against transformers' own forward on words."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qrlora_deploy.data.examples import read_examples
from qrlora_deploy.errors import MalformedInputError
from qrlora_deploy.formats.coefficients import read_coefficients
from qrlora_deploy.runtime import Buckets, Predictor, open_bundle
from tests.cli.running import run_here, succeed_here
from tests.tiny import SENTENCES, build_tokenizer, save_base
from tests.tolerances import FP32_ONNX
from tests.training.test_cached_trainer import TRAINED

TAGS = ("O", "B-PLACE", "B-THING", "I-THING")
PLACES = {"boston", "denver", "paris"}
THINGS = {"savings", "account", "alarm", "music", "money", "rice"}
SHAPE = {"max_position_embeddings": 66, "pad_token_id": 0}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
FAMILIES = {"Bert": ("query", WIDTHS), "DistilBert": ("q_lin", DISTIL), "Roberta": ("query", WIDTHS)}


def tag_words(words: list[str]) -> list[str]:
    tags: list[str] = []
    for word in words:
        goes_on = bool(tags) and tags[-1].endswith("THING")
        tags.append("B-PLACE" if word in PLACES else f"{'I' if goes_on else 'B'}-THING" if word in THINGS else "O")
    return tags


# Words that the tokenizer takes apart into letters, and some that it knows.
ROWS = [["fly", "to", *sentence.split()[::-1], "!"] for sentence in SENTENCES] + [s.split() for s in SENTENCES]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def save_encoder(folder: Path, family: str) -> None:
    """A random encoder without a head, whose answers depend on the places of words clearly."""
    tokenizer = build_tokenizer()
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **SHAPE, **FAMILIES[family][1])
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}Model")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((1.0 if "norm.weight" in name.lower() else 0.0) + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family != "Bert":
        file = folder / "tokenizer_config.json"
        names = {"model_input_names": ["input_ids", "attention_mask"]}
        file.write_text(json.dumps(json.loads(file.read_text()) | names))


def prepare(folder: Path, family: str) -> Path:
    """A warmed-up base, its bases, a customer of the base's head and one with tags of its own."""
    save_encoder(folder / "encoder", family)
    (folder / "customers").mkdir()
    write_rows(folder / "train.jsonl", [{"tokens": row, "tags": tag_words(row)} for row in ROWS * 2])
    own = [["X" if word in PLACES else "O" for word in row] for row in ROWS]
    write_rows(
        folder / "own.jsonl", [{"words": row, "labels": tags} for row, tags in zip(ROWS * 2, own * 2, strict=True)]
    )
    short = ["--max-length", 48, "--batch-size", 8]
    warmup = ["warmup", "encoder", "--data", "train.jsonl", "--eval", "train.jsonl", "--learning-rate", 0.003]
    made = succeed_here([*warmup, "--epochs", 80, *short, "-o", "base"], folder)
    assert made["task"] == "token-classification" and tuple(made["labels"]) == TAGS and made["metrics"]["f1"] > 0.5
    factorize = ["factorize", "base", "--target", FAMILIES[family][0], "--tau", 0.6]
    succeed_here([*factorize, "-o", "basis.safetensors"], folder)
    options = ["--basis", "basis.safetensors", "--epochs", 2, "--learning-rate", 0.1, *short]
    held_out = ["--data", "train.jsonl", "--eval", "train.jsonl"]
    acme = succeed_here(["train", "base", *options, *held_out, "-o", "customers/acme.safetensors"], folder)
    assert set(acme["training"]["metrics"]) == {"f1", "accuracy"} and acme["training"]["metric"] == "f1"
    head = ["--data", "own.jsonl", "--head", "output"]
    succeed_here(["train", "base", *options, *head, "-o", "customers/bolt.safetensors"], folder)
    assert succeed_here(["inspect", "customers/bolt.safetensors"], folder)["labels"] == ["O", "X"]
    return folder


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """From a family to its folder, each made once."""
    return cache(lambda family: prepare(tmp_path_factory.mktemp(family), family))


@pytest.fixture
def place(ready: Callable[[str], Path]) -> Path:
    return ready("Bert")


def switchable(place: Path) -> Path:
    """The bundle of all customers in a folder, made once."""
    if not (place / "all").exists():
        made = succeed_here(["export", "base", "--basis", "basis.safetensors", "--head-labels", 5, "-o", "all"], place)
        assert made["outputs"][0]["shape"] == ["batch", "sequence", 5] and made["parity"]["label_agreement"] == 1.0
    return place / "all"


def expected_answers(folder: Path, rows: list[list[str]]) -> list[np.ndarray]:
    """Logits `[words, tags]` of each row in transformers, at the first token of each word, by the library's own count
    of words; nothing of the project has a part in it."""
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for words in rows:
        encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        numbers = encoded.word_ids(0)
        with torch.no_grad():
            logits = model(**encoded).logits[0].numpy()
        found.append(np.stack([logits[numbers.index(word)] for word in range(len(words))]))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["acme", "bolt"])
def test_merged_and_switchable_answers_are_those_of_transformers(
    ready: Callable[[str], Path], family: str, name: str, tmp_path: Path
) -> None:
    place = ready(family)
    customer = ["--coefficients", place / "customers" / f"{name}.safetensors"]
    succeed_here(["merge", *customer, "-o", tmp_path / "merged"], place)
    expected = expected_answers(tmp_path / "merged", ROWS)
    names, data = (TAGS, "train.jsonl") if name == "acme" else (("O", "X"), "own.jsonl")
    made = succeed_here(["export", "--merge", *customer, "--data", place / data, "-o", tmp_path / name], place)
    assert made["task"] == "token-classification" and made["outputs"][0]["shape"] == ["batch", "sequence", len(names)]
    switchable(place)
    texts = [part for row in ROWS for part in ("--text", " ".join(row))]
    served = [["predict", tmp_path / name], ["predict", "all", "--customers", "customers", "--customer", name]]
    for command in served:
        answers = succeed_here([*command, *texts], place)
        for answer, row, logits in zip(answers, ROWS, expected, strict=True):
            np.testing.assert_allclose(np.array(answer["logits"]), logits, **FP32_ONNX)
            assert answer["labels"] == [names[number] for number in logits.argmax(1)]
            for span in answer["spans"]:
                assert answer["text"][span["start"] : span["end"]] == span["text"]
            found = [span["text"] for span in answer["spans"]]
            assert " ".join(found).split() == [
                word for word, tag in zip(row, answer["labels"], strict=True) if tag != "O"
            ]
    assert succeed_here(["verify", tmp_path / name], place)["passed"]
    assert succeed_here(["verify", "all", *customer, "--data", "train.jsonl"], place)["passed"]


def test_accuracy_of_a_bundle_is_the_share_of_rows_whose_words_are_all_right(place: Path, tmp_path: Path) -> None:
    customer = ["--coefficients", "customers/acme.safetensors"]
    succeed_here(["merge", *customer, "-o", tmp_path / "merged"], place)
    answers = expected_answers(tmp_path / "merged", ROWS)
    right = [
        [TAGS[number] for number in row.argmax(1)] == tag_words(words) for row, words in zip(answers, ROWS, strict=True)
    ]
    made = succeed_here(["export", "--merge", *customer, "--data", "train.jsonl", "-o", tmp_path / "acme"], place)
    assert made["parity"]["accuracy"] == made["parity"]["accuracy_reference"] == pytest.approx(np.mean(right))
    (tmp_path / "labelled").mkdir()
    write_rows(tmp_path / "labelled" / "acme.jsonl", [{"tokens": row, "tags": tag_words(row)} for row in ROWS])
    quick = ["--scenario", "single-stream", "--batch", 1, "--length", 8, "--seconds", 0.2, "--samples", 6]
    bench = ["bench", tmp_path / "acme", "--labelled", tmp_path / "labelled", *quick, "-o", tmp_path / "report"]
    report = succeed_here(bench, place)
    assert [item["accuracy"] for item in report["accuracy"]] == [pytest.approx(np.mean(right))]


def test_unmerging_gives_the_base_back(place: Path, tmp_path: Path) -> None:
    customer = ["--coefficients", "customers/acme.safetensors"]
    succeed_here(["merge", *customer, "-o", tmp_path / "merged"], place)
    succeed_here(["merge", "--unmerge", tmp_path / "merged", *customer, "-o", tmp_path / "back"], place)
    for one, other in zip(
        expected_answers(tmp_path / "back", ROWS), expected_answers(place / "base", ROWS), strict=True
    ):
        np.testing.assert_allclose(one, other, **FP32_ONNX)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "AutoModelForTokenClassification" in card and "pipeline_tag: token-classification" in card


def test_a_graph_without_padding_and_buckets_give_the_same_spans(place: Path, tmp_path: Path) -> None:
    command = ["export", "base", "--basis", "basis.safetensors", "--padding-free", "-o", tmp_path / "free"]
    made = run_here(*command, "--json", cwd=place)
    if "its attention is its own" in made.err:
        pytest.skip("this transformers gives BERT an attention of its own")
    assert made.code == 0 and made.json["parity"]["label_agreement"] == 1.0
    texts = [" ".join(row) for row in ROWS]
    bundle = open_bundle(tmp_path / "free")
    expected = expected_answers(place / "base", ROWS)
    for predictor in (Predictor(bundle), Predictor(bundle, buckets=Buckets((4, 16), (24, 64)))):
        for answer, logits in zip(predictor.predict(texts, batch_size=5), expected, strict=True):
            np.testing.assert_allclose(np.array(answer.logits), logits, **FP32_ONNX)


@pytest.mark.parametrize(("family", "layers"), [("Bert", 1), ("Bert", 2), ("DistilBert", 2), ("Roberta", 1)])
def test_a_cached_trunk_trains_as_the_whole_model_does(
    ready: Callable[[str], Path], family: str, layers: int, tmp_path: Path
) -> None:
    place, target = ready(family), FAMILIES[family][0]
    made = ["factorize", "base", "--target", target, "--tau", 0.6, "--last-layers", layers, "-o", tmp_path / "last"]
    succeed_here(made, place)
    options = ["--data", "train.jsonl", "--epochs", 3, "--learning-rate", 0.1, "--batch-size", 8, "--max-length", 48]
    found = []
    for where in ("host", "off"):
        output = tmp_path / f"{where}.safetensors"
        command = ["train", "base", "--basis", tmp_path / "last", *options, "--trunk-cache", where, "-o", output]
        training = succeed_here(command, place)["training"]
        assert training["trunk_cache"] == where
        found.append((training["loss"], read_coefficients(output).values))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    np.testing.assert_allclose(found[0][1], found[1][1], **TRAINED)


def test_long_texts_are_cut_and_their_last_words_are_outside(place: Path) -> None:
    bundle = open_bundle(switchable(place))
    words = ["paris", "account"] * 4000
    answer = Predictor(bundle).predict([" ".join(words)])[0]
    room = bundle.manifest.max_length - 2
    assert sum(bool(logits) for logits in answer.logits) == room
    assert set(answer.labels[room:]) <= {"O"}
    assert all(span.end <= len(" ".join(words[:room])) for span in answer.spans)


def test_other_data_and_other_bases_are_refused_in_a_line(place: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.tsv").write_text("text\tlabel\nhello there\ta\ngood bye\tb\n", "utf-8")
    options = ["--basis", "basis.safetensors", "--epochs", 1, "-o", tmp_path / "x.safetensors"]
    shown = run_here("train", "base", "--data", tmp_path / "plain.tsv", *options, cwd=place)
    assert shown.code == 2 and "its texts have labels, a token-classification needs tags of words" in shown.err
    shown = run_here("train", "base", "--data", tmp_path / "plain.tsv", "--head", "output", *options, cwd=place)
    assert shown.code == 2 and "make a base for text-classification by `warmup`" in shown.err
    save_base(tmp_path / "classifier")
    succeed_here(["factorize", tmp_path / "classifier", "--target", "query", "-o", tmp_path / "other"], place)
    data = ["--data", "train.jsonl", "--head", "output", "--basis", tmp_path / "other", "-o", tmp_path / "y"]
    shown = run_here("train", tmp_path / "classifier", *data, cwd=place)
    assert shown.code == 2 and "make a base for token-classification by `warmup`" in shown.err
    (tmp_path / "fleet").mkdir()
    (tmp_path / "fleet" / "acme.jsonl").write_bytes((place / "train.jsonl").read_bytes())
    fleet = [
        "train-fleet",
        "base",
        "--basis",
        "basis.safetensors",
        "--data",
        tmp_path / "fleet",
        "-o",
        tmp_path / "out",
    ]
    shown = run_here(*fleet, cwd=place)
    assert "a fleet trains no token-classification; train this customer by `train`" in shown.err + shown.out
    with pytest.raises(MalformedInputError, match="takes no pairs"):
        Predictor(open_bundle(switchable(place))).predict(["a"], ["b"])


def test_spans_of_characters_train_the_same_customer(place: Path, tmp_path: Path) -> None:
    rows = [{"text": " ".join(row), "spans": []} for row in ROWS * 2]
    for row in rows:
        start = 0
        for word in row["text"].split():
            if word in PLACES:
                row["spans"].append({"start": start, "end": start + len(word), "label": "PLACE"})
            start += len(word) + 1
    write_rows(tmp_path / "spans.jsonl", rows)
    words = [{"tokens": row, "tags": ["B-PLACE" if word in PLACES else "O" for word in row]} for row in ROWS * 2]
    write_rows(tmp_path / "words.jsonl", words)
    one, other = (read_examples(tmp_path / name) for name in ("spans.jsonl", "words.jsonl"))
    assert one.digest == other.digest
    options = ["--basis", "basis.safetensors", "--epochs", 1, "--max-length", 48, "-o", tmp_path / "a.safetensors"]
    made = succeed_here(["train", "base", "--data", tmp_path / "spans.jsonl", *options], place)
    assert made["training"]["rows"] == len(rows)
