"""A sentence encoder the whole way through the command line, held against pooled states of transformers' AutoModel."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

import qrlora_deploy as qr
from tests.cli.running import run_here, succeed_here
from tests.models.test_sentence_modules import save_modules
from tests.tiny import SENTENCES, save_base
from tests.tolerances import FP32_ONNX, FP32_SIDE_BRANCH

# The next sentence turned around, which the bases do not find.
QUESTIONS = [" ".join(sentence.split()[::-1]) for sentence in (*SENTENCES[1:], SENTENCES[0])]
SHORT = ["--max-length", 32, "--batch-size", 6, "--task", "embedding"]
KINDS = ("mean", "first", "masked")
"""Bases: mean pooling of length 1; the first token of any length; a masked language model without its head."""

EMBEDDING: dict[str, Any] = FP32_ONNX | {"atol": 1e-5}
"""Numbers of an embedding of length 1 and width 32 are about 0.2."""


def save_encoder(folder: Path, kind: str) -> None:
    save_base(folder)
    if kind == "masked":
        AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(folder)
        file = folder / "model.safetensors"
        # As sentence-transformers saves what it trained from one: the encoder alone, under its own names.
        kept = {
            name.removeprefix("bert."): value for name, value in load_file(file).items() if name.startswith("bert.")
        }
        save_file({name.removeprefix("bert."): value for name, value in kept.items()}, file, {"format": "pt"})
        return
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    modes = {"pooling_mode_cls_token": kind == "first", "pooling_mode_mean_tokens": kind == "mean"}
    settings = {"word_embedding_dimension": 32} | modes
    save_modules(folder, settings, *(["Normalize"] if kind == "mean" else []))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders with a basis and a customer each, trained on questions that go with sentences."""
    folder = tmp_path_factory.mktemp("embedding")
    lines = ["anchor\tpositive", *(f"{a}\t{b}" for a, b in zip(QUESTIONS, SENTENCES, strict=True))]
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    for kind in KINDS:
        save_encoder(folder / kind, kind)
        (folder / f"{kind}-customers").mkdir()
        target = ["--target", "query,value,output.dense", "--tau", 0.6]
        succeed_here(["factorize", kind, *target, "-o", f"{kind}.safetensors"], folder)
        data = ["--data", "pairs.tsv", "--eval", "pairs.tsv", "--epochs", 8, "--learning-rate", 0.2, *SHORT]
        output = ["-o", f"{kind}-customers/acme.safetensors"]
        made = succeed_here(["train", kind, "--basis", f"{kind}.safetensors", *data, *output], folder)["training"]
        assert set(made["metrics"]) == {"mrr_at_10", "accuracy_at_1"} and made["metric"] == "mrr_at_10"
        assert made["metrics"]["mrr_at_10"] > made["baseline"]["mrr_at_10"]
    return folder


def pooled(folder: Path, kind: str, texts: list[str]) -> np.ndarray:
    """`[n, width]` fp64: own pooling of what transformers' AutoModel gives for each text alone."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().numpy()
        vector = states[0] if kind == "first" else states.mean(0)
        found.append(vector / np.linalg.norm(vector) if kind == "mean" else vector)
    return np.array(found)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_switchable_embeddings_are_pooled_states_of_transformers(
    place: Path, kind: str, tmp_path: Path
) -> None:
    customers = place / f"{kind}-customers"
    customer = ["--coefficients", customers / "acme.safetensors"]
    succeed_here(["merge", *customer, "-o", tmp_path / "merged"], place)
    base, expected = (pooled(folder, kind, list(SENTENCES)) for folder in (place / kind, tmp_path / "merged"))
    assert np.abs(base - expected).max() > 0.05
    made = succeed_here(["export", "--merge", *customer, "--data", "pairs.tsv", "-o", tmp_path / "acme"], place)
    assert made["task"] == "feature-extraction" and made["labels"] == []
    assert made["outputs"][0]["name"] == "embeddings" and made["outputs"][0]["shape"] == ["batch", 32]
    assert made["parity"]["max_abs_error"] <= made["parity"]["bound"] < 1e-2 * np.abs(expected).max()
    basis = ["--basis", f"{kind}.safetensors", "--task", "embedding"]
    succeed_here(["export", kind, *basis, "-o", tmp_path / "all"], place)
    texts = [part for sentence in SENTENCES for part in ("--text", sentence)]
    mine = ["--customers", customers, "--customer", "acme"]
    for command, wanted in ((["acme"], expected), (["all", *mine], expected), (["all"], base)):
        answers = succeed_here(["predict", tmp_path / command[0], *command[1:], *texts], place)
        np.testing.assert_allclose([answer["embedding"] for answer in answers], wanted, **EMBEDDING)
    with_customers = qr.open_predictor(tmp_path / "all", customers=customers)
    found = with_customers.embed(SENTENCES, customers=["acme", None] * 3, batch_size=4)
    assert found.shape == (6, 32) and found.dtype == np.float32
    np.testing.assert_allclose(found, np.where(np.arange(6)[:, None] % 2 == 0, expected, base), **EMBEDDING)
    assert succeed_here(["verify", tmp_path / "acme"], place)["passed"]
    assert succeed_here(["verify", tmp_path / "all", *customer, "--data", "pairs.tsv"], place)["passed"]


@pytest.mark.parametrize("kind", KINDS)
def test_merge_keeps_how_the_base_pools_and_unmerge_gives_it_back(place: Path, kind: str, tmp_path: Path) -> None:
    customer = ["--coefficients", place / f"{kind}-customers" / "acme.safetensors"]
    basis = ["--basis", place / f"{kind}.safetensors"]
    succeed_here(["merge", *customer, "-o", tmp_path / "merged"], place)
    for name in ("modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "merged" / name).exists() == (place / kind / name).exists()
    assert "AutoModel.from_pretrained" in (tmp_path / "merged" / "README.md").read_text()
    again = tmp_path / "again"
    # Away from its base, so that the update is subtracted.
    succeed_here(["merge", "--unmerge", "merged", *basis, *customer, "-o", again], tmp_path)
    assert json.loads((again / "config.json").read_text()) == json.loads((place / kind / "config.json").read_text())
    np.testing.assert_allclose(pooled(again, kind, QUESTIONS), pooled(place / kind, kind, QUESTIONS), **EMBEDDING)


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        (["--precision", "fp16"], 2e-2),
        (["--precision", "int8", "--calibration", "pairs.tsv"], 0.3),
        (["--padding-free"], 1e-5),
        (["--table-dtype", "fp16"], 2e-2),
    ],
)
def test_other_forms_of_the_graph(place: Path, options: list[str], bound: float, tmp_path: Path) -> None:
    form = ["export", "mean", "--basis", "mean.safetensors", "--task", "embedding", *options, "-o", tmp_path / "all"]
    ran = run_here(*form, "--json", cwd=place)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["parity"]["label_agreement"] > 1 - bound


def test_the_trunk_cache_and_the_whole_model_train_the_same(place: Path, tmp_path: Path) -> None:
    succeed_here(
        ["factorize", "mean", "--target", "query,value", "--last-layers", 1, "-o", tmp_path / "b.safetensors"], place
    )
    options = [
        "--basis",
        tmp_path / "b.safetensors",
        "--data",
        "pairs.tsv",
        "--eval",
        "pairs.tsv",
        "--epochs",
        3,
        *SHORT,
    ]
    for cache in ("host", "off"):
        output = ["--trunk-cache", cache, "-o", tmp_path / f"{cache}.safetensors"]
        succeed_here(["train", "mean", *options, *output], place)
    cached, whole = (qr.Coefficients.load(tmp_path / f"{cache}.safetensors") for cache in ("host", "off"))
    assert np.abs(whole.values).max() > 0.01
    np.testing.assert_allclose(cached.values, whole.values, rtol=0, atol=2e-4 * np.abs(whole.values).max())
    assert cached.training["metrics"] == whole.training["metrics"]


def test_bench_runs_and_says_that_there_is_no_accuracy(place: Path, tmp_path: Path) -> None:
    customer = ["--coefficients", "mean-customers/acme.safetensors"]
    succeed_here(["export", "--merge", *customer, "-o", tmp_path / "acme"], place)
    (tmp_path / "labelled").mkdir()
    (tmp_path / "labelled" / "acme.tsv").write_text("text\tlabel\na\tb\n", "utf-8")
    quick = ["--scenario", "single-stream", "--batch", 1, "--length", 8, "--seconds", 0.2, "--samples", 6]
    bench = ["bench", tmp_path / "acme", "--labelled", tmp_path / "labelled", *quick, "-o", tmp_path / "report"]
    report = succeed_here(bench, place)
    assert [item["error"] for item in report["accuracy"]] == ["a feature-extraction has no accuracy"]


def test_one_pair_a_step_or_in_all_teaches_nothing_and_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "one.tsv").write_text("anchor\tpositive\na\tb\n", "utf-8")
    train = ["train", "mean", "--basis", "mean.safetensors", "-o", tmp_path / "c.safetensors", "--data"]
    for data, size, message in (
        (tmp_path / "one.tsv", 6, "--data holds 1 row; a feature-extraction learns from 2 or more"),
        ("pairs.tsv", 1, "--batch-size 1: a feature-extraction learns from 2 rows a step or more"),
    ):
        found = run_here(*train, data, "--task", "embedding", "--max-length", 32, "--batch-size", size, cwd=place)
        assert found.code == 2 and message in found.err


def test_what_does_not_fit_is_refused_in_one_line(place: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        ran = run_here(*arguments, cwd=place)
        assert ran.code == 2, ran.out
        return ran.err

    out, data = ["-o", tmp_path / "out"], ["--data", "pairs.tsv"]
    train = ["train", "mean", "--basis", "mean.safetensors", *out]
    assert "which column is the label?" in refused(*train, *data)
    (tmp_path / "labelled.tsv").write_text("text\ttext_pair\tlabel\na\tb\t1\na\tc\t0\n", "utf-8")
    labelled = ["--data", tmp_path / "labelled.tsv"]
    assert "take it for embeddings by --task embedding" in refused(*train, *labelled)
    assert "line 3 has the label '0'" in refused(*train, *labelled, "--task", "embedding")
    assert "no output layer" in refused(*train, *data, "--task", "embedding", "--head", "output")
    assert "no output layer" in refused("warmup", "mean", *data, "--task", "embedding", *out)
    fleet = ["train-fleet", "mean", "--basis", "mean.safetensors", *data, "--customer-column", "anchor", *out]
    assert "a fleet trains no feature-extraction" in refused(*fleet, "--task", "embedding")
    export = ["export", "mean", "--basis", "mean.safetensors", *out]
    assert "without a task head" in refused(*export)
    assert "--head-labels belongs to bases with an output layer" in refused(
        *export, "--task", "embedding", "--head-labels", 3
    )


@pytest.mark.parametrize("kind", ["mean", "first"])
def test_sentence_transformers_opens_what_was_merged(place: Path, kind: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    customer = ["--coefficients", place / f"{kind}-customers" / "acme.safetensors"]
    succeed_here(["merge", *customer, "-o", tmp_path / "merged"], place)
    found = library.SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode(list(SENTENCES))
    np.testing.assert_allclose(found, pooled(tmp_path / "merged", kind, list(SENTENCES)), **EMBEDDING)


def test_a_model_in_pytorch_takes_an_embeddings_customer_and_gives_it_back(place: Path, tmp_path: Path) -> None:
    customer, basis = place / "mean-customers" / "acme.safetensors", place / "mean.safetensors"
    qr.merge(place / "mean", basis, customer, tmp_path / "merged")
    ids = AutoTokenizer.from_pretrained(place / "mean")(SENTENCES[0], return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tmp_path / "merged").eval()(**ids).last_hidden_state
        model = AutoModel.from_pretrained(place / "mean").eval()
        before = model(**ids).last_hidden_state
        found = qr.load_customer(model, basis, customer)(**ids).last_hidden_state
    torch.testing.assert_close(found, expected, **FP32_SIDE_BRANCH)
    assert (found - before).abs().max() > 0.1
    again = qr.coefficients_of(model, task="embedding")
    assert again.task == "feature-extraction" and again.labels == ()
    np.testing.assert_allclose(again.values, qr.Coefficients.load(customer).values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["mean", "masked"])
def test_the_other_exporters_write_a_customer(place: Path, kind: str, tmp_path: Path) -> None:
    customer = ["--coefficients", place / f"{kind}-customers" / "acme.safetensors"]
    folder = tmp_path / "lora"
    made = succeed_here(["export", *customer, "--format", "peft", "-o", folder], place)
    assert made["task"] == "feature-extraction" and made["modules_to_save"] == []
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["task_type"] == "FEATURE_EXTRACTION"
    name = "BertForMaskedLM" if kind == "masked" else "BertModel"
    assert f"{name}.from_pretrained" in (folder / "README.md").read_text()
    factors = load_file(folder / "adapter_model.safetensors")
    succeed_here(["merge", *customer, "-o", tmp_path / "merged"], place)
    base, merged = (load_file(at / "model.safetensors") for at in (place / kind, tmp_path / "merged"))
    model = getattr(transformers, name)(AutoConfig.from_pretrained(place / kind))
    for path in settings["target_modules"]:
        assert isinstance(model.get_submodule(path), torch.nn.Linear)
        update = factors[f"base_model.model.{path}.lora_B.weight"] @ factors[f"base_model.model.{path}.lora_A.weight"]
        stored = f"{path.removeprefix('bert.')}.weight"
        torch.testing.assert_close(base[stored] + update, merged[stored], **FP32_SIDE_BRANCH)
    adapter = ["--format", "onnx-adapter", "-o", tmp_path / "acme.onnx_adapter"]
    assert succeed_here(["export", *customer, *adapter], place)["task"] == "feature-extraction"


def test_buckets_answer_as_batches_that_come_as_they_are(place: Path, tmp_path: Path) -> None:
    basis = ["--basis", "mean.safetensors", "--task", "embedding"]
    succeed_here(["export", "mean", *basis, "-o", tmp_path / "all"], place)
    places = {"customers": place / "mean-customers"}
    plain = qr.open_predictor(tmp_path / "all", **places)
    fixed = qr.open_predictor(tmp_path / "all", **places, buckets=qr.Buckets((8,), (16, 32)))
    found, expected = (one.embed(SENTENCES, customers=["acme", None] * 3) for one in (fixed, plain))
    np.testing.assert_allclose(found, expected, **EMBEDDING)
