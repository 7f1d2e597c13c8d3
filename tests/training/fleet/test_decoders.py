"""Customers of a decoder in a fleet: rows of all of them in one batch, each as `train` makes it alone."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qrlora_deploy as qr
from qrlora_deploy.data.examples import read_examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import read_coefficients
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.training.fleet.customers import FleetSource
from qrlora_deploy.training.fleet.options import FleetOptions, FleetReport
from qrlora_deploy.training.fleet.run import train_fleet
from qrlora_deploy.training.settings import TrainSettings
from qrlora_deploy.training.trainer import train
from qrlora_deploy.training.trunk.split import SplitModel
from tests.tiny_decoder import save_decoder
from tests.training.fleet.making import check_same

SETTINGS = TrainSettings(epochs=3, batch_size=4, max_length=40, learning_rate=0.1, device="cpu", seed=1)
WORDS = ("parcel", "order", "invoice", "refund", "hello", "thanks")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(save_decoder(tmp_path_factory.mktemp("decoder") / "base")))


@pytest.fixture(scope="module")
def basis(decoder: Checkpoint) -> Basis:
    return qr.factorize(decoder)


def prompts(count: int, seed: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = random.choice(WORDS, random.integers(1, 6)).tolist()
        rows.append({"prompt": " ".join(words), "completion": " " + " ".join(words[: random.integers(1, 3)])})
    return rows


def chats(count: int, seed: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
        }
        for row in prompts(count, seed)
    ]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_folders(folder: Path) -> list[str]:
    """Customers with other numbers of rows, one of them with chats."""
    made = {"acme": (prompts, 9), "beta": (prompts, 14), "chat": (chats, 6)}
    for number, (name, (make, count)) in enumerate(made.items()):
        write_lines(folder / "data" / f"{name}.jsonl", make(count, number))
        write_lines(folder / "held-out" / f"{name}.jsonl", make(5, 100 + number))
    return list(made)


def run(
    decoder: Checkpoint, basis: Basis, folder: Path, held_out: bool, settings: TrainSettings = SETTINGS, **source: Any
) -> FleetReport:
    evaluation = folder / "held-out" if held_out else None
    source = {"data": folder / "data", "evaluation": evaluation} | source
    return train_fleet(decoder, basis, FleetSource(**source), settings, FleetOptions(folder / "out", rows_per_step=12))


@pytest.mark.parametrize("held_out", [True, False])
def test_every_customer_becomes_what_it_is_alone(
    decoder: Checkpoint, basis: Basis, tmp_path: Path, held_out: bool
) -> None:
    names = write_folders(tmp_path)
    report = run(decoder, basis, tmp_path, held_out)
    assert [(line.status, line.reason) for line in report.lines] == [("trained", "")] * 3
    for name in names:
        customer = read_coefficients(tmp_path / "out" / f"{name}.safetensors")
        assert np.abs(customer.values).max() > 0.05
        parts = [read_examples(tmp_path / place / f"{name}.jsonl") for place in ("data", "held-out")]
        evaluation = parts[1] if held_out else None
        check_same(customer, train(decoder, basis, parts[0], evaluation, SETTINGS, tmp_path / f"{name}.work"))


def test_a_trunk_is_cached_below_the_first_adapted_block(
    decoder: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_folders(tmp_path)
    upper = qr.factorize(decoder, last_layers=1)
    settings = replace(SETTINGS, trunk_cache="off")
    asked: list[int] = []
    given = SplitModel.given
    monkeypatch.setattr(SplitModel, "given", lambda self, hidden: asked.append(self.first) or given(self, hidden))
    report = run(decoder, upper, tmp_path, True)
    assert [(line.status, line.reason) for line in report.lines] == [("trained", "")] * 3
    assert set(asked) == {1} and len(asked) > 10
    for name in names:
        customer = read_coefficients(tmp_path / "out" / f"{name}.safetensors")
        assert np.abs(customer.values).max() > 0.05
        parts = [read_examples(tmp_path / place / f"{name}.jsonl") for place in ("data", "held-out")]
        check_same(customer, train(decoder, upper, *parts, settings, tmp_path / f"{name}.work"))


def test_labels_are_judged_by_their_likelihoods_as_alone(decoder: Checkpoint, basis: Basis, tmp_path: Path) -> None:
    for customer, words in {"acme": (" red", " green", " blue"), "beta": (" yes", " no", " yes")}.items():
        rows = [{"prompt": word, "completion": answer} for word, answer in zip(WORDS, words, strict=False)]
        write_lines(tmp_path / "data" / f"{customer}.jsonl", rows * 4)
        write_lines(tmp_path / "held-out" / f"{customer}.jsonl", rows)
    settings = replace(SETTINGS, epochs=12, learning_rate=0.3)
    run(decoder, basis, tmp_path, True, settings)
    for customer in ("acme", "beta"):
        found = read_coefficients(tmp_path / "out" / f"{customer}.safetensors").training
        parts = [read_examples(tmp_path / place / f"{customer}.jsonl") for place in ("data", "held-out")]
        alone = train(decoder, basis, *parts, settings, tmp_path / f"{customer}.work").training
        for when in ("baseline", "metrics"):
            assert found[when]["label_accuracy"] == alone[when]["label_accuracy"]
        assert found["metrics"]["label_accuracy"] > found["baseline"]["label_accuracy"]


def test_rows_of_all_customers_may_be_in_one_file(decoder: Checkpoint, basis: Basis, tmp_path: Path) -> None:
    rows = [row | {"who": name} for number, name in enumerate("ab") for row in prompts(6 + number, number)]
    data = write_lines(tmp_path / "all.jsonl", rows)
    report = run(decoder, basis, tmp_path, False, data=data, evaluation=None, customer_column="who")
    assert {line.customer: line.rows for line in report.lines} == {"a": 6, "b": 7}
    alone = read_examples(write_lines(tmp_path / "a.jsonl", prompts(6, 0)))
    found = read_coefficients(tmp_path / "out" / "a.safetensors")
    check_same(found, train(decoder, basis, alone, None, SETTINGS, tmp_path / "work"))


def test_what_is_wrong_with_one_stops_no_other(decoder: Checkpoint, basis: Basis, tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "acme.jsonl", prompts(5, 0))
    long = [{"prompt": "parcel " * 60, "completion": " x"}]
    write_lines(tmp_path / "data" / "long.jsonl", long)
    write_lines(tmp_path / "data" / "some.jsonl", prompts(5, 1) + long)
    write_lines(tmp_path / "data" / "labels.jsonl", [{"text": "hello", "label": "a"}])
    lines = {line.customer: line for line in run(decoder, basis, tmp_path, False).lines}
    assert {name: line.status for name, line in lines.items()} == {
        **{"acme": "trained", "some": "trained"},
        **{"long": "failed", "labels": "failed"},
    }
    assert "no row has an answer within its first 40 tokens" in lines["long"].reason
    remark = read_coefficients(tmp_path / "out" / "some.safetensors").training["remark"]
    assert remark == "1 rows are cut at max_length=40; 1 of them have no answer before that"


def test_a_head_is_refused_before_anything_is_read(decoder: Checkpoint, basis: Basis, tmp_path: Path) -> None:
    write_folders(tmp_path)
    with pytest.raises(InputError, match="keeps the head of its decoder"):
        run(decoder, basis, tmp_path, False, TrainSettings(head="output", device="cpu"))


def test_the_default_rate_is_that_of_decoders(decoder: Checkpoint, basis: Basis, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data" / "acme.jsonl", prompts(4, 0)).parent
    settings = TrainSettings(epochs=1, batch_size=4, device="cpu")
    run(decoder, basis, tmp_path, False, settings, data=data)
    record = read_coefficients(tmp_path / "out" / "acme.safetensors").training
    alone = train(decoder, basis, read_examples(data / "acme.jsonl"), None, settings, tmp_path / "work")
    assert record["learning_rate"] == alone.training["learning_rate"]
