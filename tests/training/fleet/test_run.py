"""A fleet gives every customer what it would have become alone; what is wrong with one stops no other."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qrlora_deploy.data.examples import Examples, read_examples
from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients
from qrlora_deploy.io.files import digest_file
from qrlora_deploy.io.temporary import lock_folder, temporary_folder
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.training.fleet import engine as fleet_engine
from qrlora_deploy.training.fleet import loop as fleet_loop
from qrlora_deploy.training.fleet import model as fleet_model
from qrlora_deploy.training.fleet import pool as fleet_pool
from qrlora_deploy.training.fleet import writing
from qrlora_deploy.training.fleet.branch import RowLinear
from qrlora_deploy.training.fleet.customers import Customer, FleetSource
from qrlora_deploy.training.fleet.engine import CHUNK_TOKENS, Chunk, Engine
from qrlora_deploy.training.fleet.model import FleetModel
from qrlora_deploy.training.fleet.options import FleetOptions, FleetReport
from qrlora_deploy.training.fleet.run import train_fleet
from qrlora_deploy.training.fleet.schedule import StepRows
from qrlora_deploy.training.fleet.shipping import in_one_copy
from qrlora_deploy.training.outputs import Outputs
from qrlora_deploy.training.precision import halve_frozen
from qrlora_deploy.training.settings import TrainSettings
from qrlora_deploy.training.trainer import train
from tests.tiny import LABELS
from tests.training.fleet.making import (
    ON_GPU,
    check_same,
    random_rows,
    settings_of,
    without_dropout,
    write_folders,
    write_lists,
    write_rows,
)


@pytest.fixture(scope="module")
def still_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny base without dropout."""
    return open_checkpoint(str(without_dropout(tiny_base, tmp_path_factory.mktemp("still") / "base")))


def run(
    checkpoint: Checkpoint, basis: Basis, folder: Path, settings: TrainSettings, held_out: bool = True, rows: int = 12
) -> FleetReport:
    """A fleet of `write_folders` into `folder/out`, three customers of batch 4 beside each other by default."""
    source = FleetSource(folder / "data", folder / "held-out" if held_out else None)
    return train_fleet(checkpoint, basis, source, settings, FleetOptions(folder / "out", rows_per_step=rows))


def alone(
    checkpoint: Checkpoint, basis: Basis, folder: Path, name: str, settings: TrainSettings, held_out: bool = True
) -> Coefficients:
    """The single run of one of these customers."""
    files = [next((folder / place).glob(f"{name}.*")) for place in ("data", "held-out")]
    parts = [read_examples(file) for file in files]
    return train(checkpoint, basis, parts[0], parts[1] if held_out else None, settings, folder / f"{name}.work")


@pytest.mark.parametrize(("head", "held_out"), [("frozen", True), ("frozen", False), ("output", True)])
def test_every_customer_becomes_what_it_is_alone(
    still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path, head: str, held_out: bool
) -> None:
    names, settings = write_folders(tmp_path), settings_of(head=head)
    if head == "output":
        # Other labels, more of them, and numbers: each customer has an output layer of its own shape.
        write_rows(tmp_path / "data" / "customer-2.tsv", random_rows(30, 2, tuple("abcdef")))
        write_rows(tmp_path / "held-out" / "customer-2.tsv", random_rows(6, 102, tuple("abcdef")))
        write_rows(tmp_path / "data" / "customer-4.tsv", random_rows(9, 4, ("0.5", "-1.5", "2")))
        write_rows(tmp_path / "held-out" / "customer-4.tsv", random_rows(5, 104, ("0.5", "-1.5", "2")))
    report = run(still_base, tiny_basis, tmp_path, settings, held_out)
    assert [line.status for line in report.lines] == ["trained"] * len(names)
    for name in names:
        customer = read_coefficients(tmp_path / "out" / f"{name}.safetensors")
        customer.check_fits(tiny_basis)
        assert np.abs(customer.values).max() > 0.05
        check_same(customer, alone(still_base, tiny_basis, tmp_path, name, settings, held_out))


def make_multi_label(folder: Path, customers: dict[str, Sequence[str]]) -> None:
    """Give some customers of `write_folders` lists of labels, by name."""
    for number, (name, labels) in enumerate(customers.items()):
        for place, count, seed in (("data", 14 + 5 * number, number), ("held-out", 9, 100 + number)):
            (folder / place / f"{name}.tsv").unlink()
            write_lists(folder / place / f"{name}.jsonl", count, seed, labels)


@pytest.mark.parametrize("held_out", [True, False])
def test_multi_label_customers_become_what_they_are_alone_beside_others(
    still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path, held_out: bool
) -> None:
    names, settings = write_folders(tmp_path), settings_of(head="output")
    # More labels than the base and fewer; neighbours are a classification and a regression.
    make_multi_label(tmp_path, {names[0]: "abcdefg", names[2]: "xyz", names[3]: "q"})
    for place, count in (("data", 9), ("held-out", 5)):
        write_rows(tmp_path / place / "customer-4.tsv", random_rows(count, count, ("0.5", "-1.5", "2")))
    report = run(still_base, tiny_basis, tmp_path, settings, held_out)
    assert [line.status for line in report.lines] == ["trained"] * len(names)
    for name in names:
        customer = read_coefficients(tmp_path / "out" / f"{name}.safetensors")
        assert np.abs(customer.values).max() > 0.05
        check_same(customer, alone(still_base, tiny_basis, tmp_path, name, settings, held_out))
        if customer.task == "text-multi-label":
            assert customer.training["metric"] == "f1_micro"
            assert not held_out or 0 < customer.training["metrics"]["f1_micro"] < 1
    tasks = {read_coefficients(path).task for path in (tmp_path / "out").glob("*.safetensors")}
    assert tasks == {"text-classification", "text-regression", "text-multi-label"}


@pytest.mark.parametrize("way", ["packed", "padded", "whole"])
def test_multi_label_customers_share_a_frozen_head(
    still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(still_base.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    base = open_checkpoint(str(folder))
    names, settings = write_folders(tmp_path, [(1, 1)] * 3), settings_of()
    make_multi_label(tmp_path, dict.fromkeys(names, LABELS))
    if way == "padded":
        monkeypatch.setattr(FleetModel, "_build_upper", lambda _: None)
    if way == "whole":
        monkeypatch.setattr(fleet_model, "_split", lambda *_: None)
    monkeypatch.setitem(CHUNK_TOKENS, "cpu", 40)
    report = run(base, tiny_basis, tmp_path, settings)
    assert [line.status for line in report.lines] == ["trained"] * len(names)
    for name in names:
        customer = read_coefficients(tmp_path / "out" / f"{name}.safetensors")
        assert customer.training["baseline"].keys() == {"f1_micro", "f1_macro", "accuracy"}
        check_same(customer, alone(base, tiny_basis, tmp_path, name, settings))


def test_rerankers_become_what_they_are_alone(still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path) -> None:
    names, settings = write_folders(tmp_path, [(12, 8), (7, 6), (19, 9)]), settings_of(head="output", task="reranker")
    for number, name in enumerate(names):
        for place, count in (("data", 12 + 3 * number), ("held-out", 8)):
            first, second = (random_rows(count, seed + number) for seed in (200, 300))
            marks = ("0", "1", "0.25") if number else ("0", "1")
            labels = [marks[row % len(marks)] for row in range(count)]
            rows = [(one[0], other[0], label) for one, other, label in zip(first, second, labels, strict=True)]
            write_rows(tmp_path / place / f"{name}.tsv", rows, ("text", "text_pair", "label"))
    report = run(still_base, tiny_basis, tmp_path, settings)
    assert [(line.status, line.reason) for line in report.lines] == [("trained", "")] * len(names)
    for name in names:
        customer = read_coefficients(tmp_path / "out" / f"{name}.safetensors")
        assert customer.task == "text-ranking" and np.abs(customer.values).max() > 0.05
        check_same(customer, alone(still_base, tiny_basis, tmp_path, name, settings))


def test_thresholds_are_those_of_the_best_epoch_alone_too(
    still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path
) -> None:
    names = write_folders(tmp_path)
    make_multi_label(tmp_path, {names[0]: "abcdefg", names[1]: "xyz"})
    (tmp_path / "held-out" / f"{names[2]}.tsv").unlink()
    settings = settings_of(head="output", tune_thresholds=True)
    report = run(still_base, tiny_basis, tmp_path, settings)
    assert [line.status for line in report.lines] == ["trained"] * len(names)
    for name in names[:2]:
        customer = read_coefficients(tmp_path / "out" / f"{name}.safetensors")
        assert set(customer.thresholds) != {0.5} and len(customer.thresholds) == len(customer.labels)
        # Each label's F1 is the best that a threshold gives, so their mean is no worse.
        before, after = (customer.training[key]["f1_macro"] for key in ("metrics", "tuned_metrics"))
        assert after > before
        check_same(customer, alone(still_base, tiny_basis, tmp_path, name, settings))
    for name in names[2:]:
        other = read_coefficients(tmp_path / "out" / f"{name}.safetensors")
        assert not other.thresholds and "tuned_metrics" not in other.training
    with pytest.raises(InputError, match="tune_thresholds chooses them on held-out rows; give evaluation"):
        run(still_base, tiny_basis, tmp_path, settings, held_out=False)


@pytest.mark.parametrize(("held_out", "reason"), [(True, "decides without thresholds"), (False, "give evaluation")])
def test_thresholds_are_refused_before_training_where_there_are_none(
    still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path, held_out: bool, reason: str
) -> None:
    name, *_ = write_folders(tmp_path)
    with pytest.raises(InputError, match=f"tune_thresholds.*{reason}"):
        alone(still_base, tiny_basis, tmp_path, name, settings_of(tune_thresholds=True), held_out)
    with pytest.raises(InputError, match=f"tune_thresholds.*{reason}"):
        run(still_base, tiny_basis, tmp_path, settings_of(tune_thresholds=True), held_out)


def ship_by_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU get its records as a GPU does: as views of one copy."""

    def copied(record: Any, device: torch.device) -> Any:
        return in_one_copy(record, lambda size: torch.empty(size, dtype=torch.uint8), device)

    for module in (fleet_model, fleet_engine, fleet_pool):
        monkeypatch.setattr(module, "ship", copied)


@pytest.mark.parametrize("way", ["packed", "copied", "padded", "whole"])
def test_neighbours_and_the_way_of_computing_change_nothing(
    still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    names, settings = write_folders(tmp_path), settings_of(epochs=3, head="output")
    make_multi_label(tmp_path, {names[1]: "abcdef"})
    run(still_base, tiny_basis, tmp_path, settings)
    (tmp_path / "out").rename(tmp_path / "before")
    if way == "padded":
        monkeypatch.setattr(FleetModel, "_build_upper", lambda _: None)
    if way == "whole":
        monkeypatch.setattr(fleet_model, "_split", lambda *_: None)
    if way in ("copied", "whole"):
        ship_by_copies(monkeypatch)
    # One customer after another, in chunks of a row or two.
    monkeypatch.setitem(CHUNK_TOKENS, "cpu", 20)
    run(still_base, tiny_basis, tmp_path, settings, rows=1)
    for name in names:
        one, two = (read_coefficients(tmp_path / place / f"{name}.safetensors") for place in ("out", "before"))
        check_same(one, two)


def test_customers_wait_until_there_is_room(
    still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, settings = write_folders(tmp_path), settings_of(epochs=2)
    # Room for the hidden states of about one customer: the others wait, and nobody is forgotten.
    monkeypatch.setattr(fleet_loop, "free_share", lambda _: 300 * 32 * 4)
    most: list[int] = []
    step = Engine.train_step

    def counted(engine: Engine, rows: StepRows, *rest: np.ndarray) -> None:
        most.append(len(set(rows.slots.tolist())))
        step(engine, rows, *rest)

    monkeypatch.setattr(Engine, "train_step", counted)
    report = run(still_base, tiny_basis, tmp_path, settings, rows=100)
    assert report.count("trained") == len(names) and max(most) < len(names)


def test_the_tiny_base_is_computed_without_padding(still_base: Checkpoint, tiny_basis: Basis) -> None:
    model = FleetModel(still_base, tiny_basis, settings_of(), 2, 4, torch.device("cpu"))
    assert model.split is not None and model.upper is not None
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with model.precision(training=True):
        # It would build a plan for every new shape.
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_the_base_is_left_alone(tiny_base: Path, tiny_basis: Basis, tmp_path: Path) -> None:
    write_folders(tmp_path)
    before = digest_file(tiny_base / "model.safetensors")
    seen: list[tuple[int, int, int]] = []
    source, options = FleetSource(tmp_path / "data"), FleetOptions(tmp_path / "out")
    train_fleet(
        open_checkpoint(str(tiny_base)),
        tiny_basis,
        source,
        settings_of(epochs=1),
        options,
        lambda *numbers: seen.append(numbers),
    )
    assert digest_file(tiny_base / "model.safetensors") == before
    assert seen[0] == (0, 0, 5) and seen[-1] == (5, 0, 5)


def test_one_bad_customer_stops_no_other(still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path) -> None:
    (good, second, *_), settings = write_folders(tmp_path), settings_of(epochs=2, head="output")
    data = tmp_path / "data"
    for name in ("customer-2", "customer-4"):
        (data / f"{name}.tsv").unlink()
    write_rows(data / "one-example.tsv", [("book a flight", "travel")])
    write_rows(data / "one-label.tsv", [("book a flight", "new")] * 3)
    write_rows(data / "no-label.tsv", [("book a flight", "travel"), ("rice", "")])
    write_rows(data / "twice.tsv", random_rows(4, 0))
    write_rows(data / "no id.tsv", random_rows(4, 0))
    (data / "twice.csv").write_text("text,label\na,travel\n")
    (data / "empty.tsv").write_text("text\tlabel\n")
    (data / "nothing.tsv").write_text("")
    (data / "broken.tsv").write_bytes(b"text\tlabel\ncaf\xe9\ttravel\n")
    (data / "numbers.jsonl").write_text('{"text": 5, "label": "travel"}\n')
    write_rows(tmp_path / "held-out" / f"{second}.tsv", [("rice", "unheard of")])
    report = run(still_base, tiny_basis, tmp_path, settings)
    reasons = {line.customer: line.reason for line in report.lines}
    trained = {name for name, reason in reasons.items() if not reason}
    assert trained == {good, "customer-3", "one-example"}
    for name, word in {
        second: "unknown label 'unheard of'",
        "one-label": "every row has the label new",
        "no-label": "row 2 has no label",
        "twice": "twice.csv and twice.tsv are the same customer",
        "no id": "no customer id",
        "empty": "holds no rows",
        "nothing": "is empty",
        "broken": "row 1 is not UTF-8",
        "numbers": "row 1 has no text",
    }.items():
        assert word in reasons[name], reasons[name]
    assert {path.stem for path in (tmp_path / "out").glob("*.safetensors")} == trained
    lines = [json.loads(line) for line in report.summary.read_text().splitlines()]
    assert {line["customer"]: line["reason"] for line in lines} == reasons
    assert [line["customer"] for line in lines] == sorted(reasons) and report.strangers == 2
    check_same(
        read_coefficients(tmp_path / "out" / f"{good}.safetensors"),
        alone(still_base, tiny_basis, tmp_path, good, settings),
    )


def test_a_customer_that_diverges_is_dropped_alone(
    still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, settings = write_folders(tmp_path), settings_of(epochs=3)
    run(still_base, tiny_basis, tmp_path, settings)
    (tmp_path / "out").rename(tmp_path / "before")
    loss = Engine._row_losses
    torn: list[int] = []

    def spoil(engine: Engine, logits: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        # The customer in slot 1 has an infinite loss in its first step.
        spoilt = (chunk.slots == 1) & (not torn)
        torn.extend(chunk.slots[spoilt].tolist())
        return torch.where(spoilt, torch.inf, loss(engine, logits, chunk))

    monkeypatch.setattr(Engine, "_row_losses", spoil)
    report = run(still_base, tiny_basis, tmp_path, settings)
    failed = [line for line in report.lines if line.status == "failed"]
    assert [line.reason for line in failed] == ["the loss became inf in epoch 1; try a smaller learning_rate"]
    for name in set(names) - {failed[0].customer}:
        one, two = (read_coefficients(tmp_path / place / f"{name}.safetensors") for place in ("out", "before"))
        check_same(one, two)


def test_a_rate_that_is_too_large_for_all_fails_all(still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path) -> None:
    write_folders(tmp_path)
    report = run(still_base, tiny_basis, tmp_path, settings_of(learning_rate=1e30, epochs=2))
    assert {line.status for line in report.lines} == {"failed"}
    assert all("try a smaller learning_rate" in line.reason for line in report.lines)
    assert list((tmp_path / "out").iterdir()) == [report.summary]


def test_a_disk_that_refuses_ends_the_run_and_what_was_written_counts(
    still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folders(tmp_path)
    write = writing.write_coefficients
    written: list[str] = []

    def fill_up(customer: Coefficients, path: Path) -> None:
        if len(written) == 2:
            raise QrloraError(f"cannot write {path}: No space left on device")
        written.append(path.name)
        write(customer, path)

    monkeypatch.setattr(writing, "WRITERS", 1)
    monkeypatch.setattr(writing, "write_coefficients", fill_up)
    with pytest.raises(QrloraError, match="No space left on device"):
        run(still_base, tiny_basis, tmp_path, settings_of(epochs=1))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*written, "summary.jsonl"])


def test_files_are_not_overwritten_unasked_and_what_is_done_is_skipped(
    still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path
) -> None:
    names, settings, out = write_folders(tmp_path), settings_of(epochs=1), tmp_path / "out"
    run(still_base, tiny_basis, tmp_path, settings)
    before = {path: digest_file(path) for path in out.iterdir()}
    with pytest.raises(InputError, match="out holds files of 5 of these customers, such as customer-0.safetensors"):
        run(still_base, tiny_basis, tmp_path, settings)
    assert {path: digest_file(path) for path in out.iterdir()} == before
    whole = read_coefficients(out / f"{names[0]}.safetensors")
    # One file was cut, one customer has other rows, one other held-out rows.
    (out / f"{names[0]}.safetensors").write_bytes(b"cut")
    write_rows(tmp_path / "data" / f"{names[1]}.tsv", random_rows(5, 77))
    write_rows(tmp_path / "held-out" / f"{names[2]}.tsv", random_rows(5, 78))
    source, options = FleetSource(tmp_path / "data", tmp_path / "held-out"), FleetOptions(out, resume=True)
    report = train_fleet(still_base, tiny_basis, source, settings, options)
    assert {line.customer for line in report.lines if line.status == "skipped"} == set(names[3:])
    check_same(read_coefficients(out / f"{names[0]}.safetensors"), whole)
    again = train_fleet(still_base, tiny_basis, source, settings, options)
    assert again.count("skipped") == 5 and again.customers_per_minute == 0
    other = train_fleet(still_base, tiny_basis, source, settings_of(epochs=1, seed=1), options)
    assert other.count("trained") == 5


def test_rows_of_one_file_are_those_of_many(still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path) -> None:
    names, settings = write_folders(tmp_path), settings_of(epochs=1)
    run(still_base, tiny_basis, tmp_path, settings, held_out=False)
    parts = {name: read_examples(tmp_path / "data" / f"{name}.tsv") for name in names}
    rows = [[name, *row] for name, part in parts.items() for row in zip(part.texts, part.labels, strict=True)]
    random = np.random.default_rng(0)
    # Mixed, but each customer's rows in their order.
    owners = random.permutation([row[0] for row in rows])
    left = {name: iter([row for row in rows if row[0] == name]) for name in names}
    write_rows(tmp_path / "all.tsv", [next(left[owner]) for owner in owners], ("id", "text", "label"))
    source = FleetSource(tmp_path / "all.tsv", customer_column="id")
    train_fleet(still_base, tiny_basis, source, settings, FleetOptions(tmp_path / "other"))
    for name in names:
        one, two = (read_coefficients(tmp_path / place / f"{name}.safetensors") for place in ("out", "other"))
        check_same(one, two)


def test_half_precision_learns(
    still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU, but for the kernels: frozen matrices in bf16, everything else under autocast.
    half, build = torch.autocast("cpu", torch.bfloat16), FleetModel.__init__

    def build_half(model: FleetModel, *args: Any) -> None:
        build(model, *args)
        halve_frozen(model.model, RowLinear)

    write_folders(tmp_path, [(24, 1)] * 2)
    settings = settings_of(epochs=12, head="output", head_learning_rate=0.05)
    source = FleetSource(tmp_path / "data", tmp_path / "data")
    train_fleet(still_base, tiny_basis, source, settings, FleetOptions(tmp_path / "exact"))
    monkeypatch.setattr(FleetModel, "__init__", build_half)
    monkeypatch.setattr(fleet_model, "mixed_precision", lambda _: half)
    train_fleet(still_base, tiny_basis, source, settings, FleetOptions(tmp_path / "half"))
    for path in (tmp_path / "half").glob("*.safetensors"):
        half_run, exact = read_coefficients(path), read_coefficients(tmp_path / "exact" / path.name)
        assert half_run.training["metrics"]["accuracy"] > half_run.training["baseline"].get("accuracy", 0) + 0.1
        assert np.corrcoef(half_run.values, exact.values)[0, 1] > 0.9


@pytest.mark.gpu
def test_a_gpu_trains_every_customer_as_alone(
    still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In fp32: bf16 keeps three digits, and rows of another shape round otherwise.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: False)
    names, settings = write_folders(tmp_path), settings_of(device="cuda", head="output")
    report = run(still_base, tiny_basis, tmp_path, settings)
    assert report.count("trained") == len(names)
    for name in names:
        customer = read_coefficients(tmp_path / "out" / f"{name}.safetensors")
        single = alone(still_base, tiny_basis, tmp_path, name, settings)
        np.testing.assert_allclose(customer.values, single.values, **ON_GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["packed", "padded", "whole"])
def test_a_gpu_learns_in_bf16(
    still_base: Checkpoint, tiny_basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "padded":
        monkeypatch.setattr(FleetModel, "_build_upper", lambda _: None)
    if way == "whole":
        monkeypatch.setattr(fleet_model, "_split", lambda *_: None)
    write_folders(tmp_path, [(24, 1)] * 3)
    settings = settings_of(device="cuda", epochs=12, head="output", head_learning_rate=0.05)
    source = FleetSource(tmp_path / "data", tmp_path / "data")
    train_fleet(still_base, tiny_basis, source, settings, FleetOptions(tmp_path / "out"))
    for path in (tmp_path / "out").glob("*.safetensors"):
        record = read_coefficients(path).training
        assert record["device"] == "cuda" and record["metrics"]["accuracy"] > record["baseline"]["accuracy"] + 0.1


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_run_had_not_finished_is_removed(tmp_path: Path, resume: bool) -> None:
    out = tmp_path / "out"
    for name in ("a.safetensors", "summary.jsonl", "b.safetensors"):
        folder = out / f".{name}.0123abcd.part"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(b"half")
        descriptor = lock_folder(folder)
        assert descriptor is not None
        os.close(descriptor)
    examples = Examples(["book a flight", "rice"], None, ["travel", "food"], "a")
    outputs = Outputs(Classification(), ("food", "travel"), new=False)
    customer = Customer("a", examples, None, outputs, [1, 0], [], TrainSettings())
    with temporary_folder(out, "a.safetensors") as alive:
        FleetOptions(out, resume).open_output([customer])
        left = {path.name for path in out.iterdir()}
    assert left == {alive.name, ".b.safetensors.0123abcd.part"}, "others may be writing those"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", ["out", "out/a.safetensors", "out/summary.jsonl"])
def test_a_pipe_is_refused_before_training(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    examples = Examples(["book a flight", "rice"], None, ["travel", "food"], "a")
    outputs = Outputs(Classification(), ("food", "travel"), new=False)
    customer = Customer("a", examples, None, outputs, [1, 0], [], TrainSettings())
    with pytest.raises(InputError, match="is no plain file but a pipe"):
        FleetOptions(tmp_path / "out", resume=True).open_output([customer])
