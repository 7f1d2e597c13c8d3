"""The GLUE benchmark: its loop is that of `train`, its records survive a crash, its tables say what was run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.glue.loop import OutOfTime, Schedule, factor, predict, train_model
from benchmarks.glue.methods import METHODS, STEPS_FACTOR, head_names, method_named, prepare
from benchmarks.glue.records import (
    append_record,
    check_settings,
    claimed,
    known_seconds,
    read_records,
    set_aside,
)
from benchmarks.glue.report import plot_curves, render_table
from benchmarks.glue.runs import WARM_UP, Choice, Place, make_plan, read_plan
from benchmarks.glue.starts import PRETRAINED, WARMED, Models
from benchmarks.glue.tasks import TASKS, Task, read_part, read_tokens, scores, write_tokens
from benchmarks.glue.work import Job, Settings, Worker, is_current
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.adapter import attach, get_coefficients, precondition
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.training.settings import STEP_LENGTH, TrainSettings, default_rate
from qrlora_deploy.training.trainer import train
from tests.tiny import LABELS, SENTENCES

RTE, STS = TASKS["RTE"], TASKS["STS-B"]
ROOT = Path(__file__).parents[2]
METHOD_NAMES = ("full", "head", "lora", "pissa", "vera", "tinylora", "qr-all")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RTE and STS-B of a dozen rows each, with a quotation mark that is text."""
    folder = tmp_path_factory.mktemp("glue")
    for task, labels in ((RTE, ("entailment", "not_entailment")), (STS, ("4.750", "0.500"))):
        (folder / task.name).mkdir()
        for part, count in (("train", 12), ("dev", 8)):
            rows = [_row(index, labels[index % 2]) for index in range(count)]
            text = "\n".join(["sentence1\tsentence2\tlabel", *rows]) + "\n"
            (folder / task.name / f"{part}.tsv").write_text(text, encoding="utf-8")
    return folder


def _row(index: int, label: str) -> str:
    second = SENTENCES[(index // 6 + index) % 6] + index % 3 * '"'
    return f"{SENTENCES[index % 6]}\t{second}\t{label}"


@pytest.fixture
def make_job(tiny_base: Path, data: Path, tmp_path: Path) -> Callable[..., Job]:
    """Makes a job of the tiny model whose tokens are there."""

    def make(tasks: tuple[str, ...] = ("RTE",), methods: tuple[str, ...] = METHOD_NAMES, **changes: object) -> Job:
        choice = Choice(("tiny",), tasks, (WARMED, PRETRAINED), methods, (0,))
        place = Place(tmp_path / "out", tmp_path / "work")
        place.make()
        plan = tuple(make_plan(choice))
        settings = Settings(epochs=1, batch_size=4, max_length=32, points=3)
        for run in plan:
            if not place.tokens(run).is_file():
                write_tokens(TASKS[run.task], str(data), open_checkpoint(str(tiny_base)), place.tokens(run), 32)
        job = Job(plan, place, {"tiny": str(tiny_base)}, settings, "cpu", 1, "first", None, os.getppid())
        return replace(job, **changes)  # type: ignore[arg-type]

    return make


def work_all(job: Job) -> Worker:
    """Do every run of a job in this process."""
    worker = Worker(job, 0)
    while worker.take():
        pass
    return worker


def test_a_plan_is_balanced_wherever_it_ends() -> None:
    choice = Choice(("mpnet",), ("RTE", "CoLA"), (WARMED, PRETRAINED), ("full", "qr-q4"), (0, 1))
    plan = make_plan(choice)
    assert len({run.key for run in plan}) == len(plan) == 4 + 16
    assert [run.method for run in plan[:4]] == [WARM_UP] * 4
    assert [(run.start, run.seed) for run in plan[4::4]] == [(WARMED, 0), (WARMED, 1), (PRETRAINED, 0), (PRETRAINED, 1)]
    assert [run.key for run in plan[4:8]] == [
        "mpnet/RTE/warmed/full/0",
        "mpnet/RTE/warmed/qr-q4/0",
        "mpnet/CoLA/warmed/full/0",
        "mpnet/CoLA/warmed/qr-q4/0",
    ]


def test_a_plan_of_a_file_has_its_warm_ups_and_names_ways_of_a_placement(tmp_path: Path) -> None:
    keys = ["m/RTE/pretrained/qr-q4@0.25/0", "m/RTE/warmed/qr-even-640@steps/1", "m/RTE/warmed/qr-all@measure/1"]
    (tmp_path / "plan").write_text("\n".join(keys))
    plan = read_plan(tmp_path / "plan")
    assert [run.key for run in plan] == [keys[0], f"m/RTE/warmed/{WARM_UP}/1", *keys[1:]]
    quarter, by_steps, measured = (method_named(run.method) for run in plan if run.method != WARM_UP)
    assert (quarter.rate_factor, quarter.last_layers) == (0.25, 4)
    assert by_steps.by_steps and by_steps.budget == 640 and measured.measured
    with pytest.raises(InputError, match="qr-none@1: no such method"):
        method_named("qr-none@1")


def test_a_step_is_measured_and_a_rate_follows_the_steps(make_job: Callable[..., Job]) -> None:
    job = make_job(methods=("qr-all@measure", "qr-all@steps", "qr-all@train"))
    work_all(job)
    records = {(record["start"], record["method"]): record for record in read_records(job.place.records)}
    assert all("error" not in record for record in records.values())
    probe = records[WARMED, "qr-all@measure"]["probe"]
    changes = probe["mean"]["kl"]
    # Small steps: the change grows as the square of their length.
    assert changes[1] / changes[0] == pytest.approx(4.0, rel=0.05) and changes[0] > 0
    run = records[WARMED, "qr-all@steps"]
    rate = default_rate(run["trainable_parameters"]) * STEPS_FACTOR / run["steps"] ** 0.5
    assert run["learning_rate"] == pytest.approx(rate)
    bounded = records[WARMED, "qr-all@train"]
    assert bounded["learning_rate"] == default_rate(bounded["trainable_parameters"], 1.0, 12, bounded["steps"])


def test_a_line_cut_by_a_crash_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append_record(path, {"key": "a", "settings": {"epochs": 3}})
    with path.open("ab") as file:
        file.write(b'{"key": "b", "sett')
    append_record(path, {"key": "c", "settings": {"epochs": 3}})
    assert [record["key"] for record in read_records(path)] == ["a", "c"]
    check_settings(path, lambda record: {"epochs": 3})
    with pytest.raises(InputError, match=r"other settings \(epochs\)"):
        check_settings(path, lambda record: {"epochs": 2})
    (tmp_path / "other.jsonl").write_text('{"name": 1}\n')
    with pytest.raises(InputError, match="line 1 is no record of a run"):
        read_records(tmp_path / "other.jsonl")


def test_a_claim_excludes_others_and_ends_with_its_block(tmp_path: Path) -> None:
    with claimed(tmp_path / "run") as first, claimed(tmp_path / "run") as second:
        assert (first, second) == (True, False)
    with claimed(tmp_path / "run") as again:
        assert again


def test_runs_made_in_another_way_are_set_aside_and_done_again(make_job: Callable[..., Job]) -> None:
    job = make_job(tasks=("RTE", "STS-B"), methods=("head", "qr-all"))
    path, other = job.place.records, job.place.output / "runs_old.jsonl"
    for run in job.plan:
        settings = job.settings.record(run.task, run.method)
        # As they were before the rate followed from the coefficients and a regression started at the mean.
        settings.pop("step_length", None), settings.pop("start_bias", None)
        kind = {"model": run.model, "task": run.task, "start": run.start, "method": run.method, "seconds": 9.0}
        append_record(path, kind | {"key": run.key, "settings": settings})
    with pytest.raises(InputError, match=r"other settings \((start_bias|step_length)\).* --set-aside FILE"):
        check_settings(path, job.settings.record_again)
    kept = ["tiny/RTE/warmed/warm-up/0", "tiny/RTE/warmed/head/0", "tiny/RTE/pretrained/head/0"]
    assert set_aside(path, other, is_current) == len(job.plan) - len(kept) == 7
    assert [record["key"] for record in read_records(path)] == kept
    assert len(read_records(other)) == 7
    check_settings(path, job.settings.record_again)
    assert set_aside(path, other, is_current) == 0 and job.done() == set(kept)
    # What was set aside still says how long a run takes.
    assert known_seconds(job.place.output)["tiny", "STS-B", WARMED, "qr-all"] == 9.0


def test_a_fresh_regression_starts_at_the_mean_and_qr_lora_at_its_own_rate(make_job: Callable[..., Job]) -> None:
    job = make_job(tasks=("STS-B",), methods=("qr-all", "lora"))
    work_all(job)
    records = {(record["start"], record["method"]): record for record in read_records(job.place.records)}
    assert all(record["settings"]["start_bias"] == "mean" for record in records.values())
    # The labels are 0.5 and 4.75: from a bias of 0 the first loss would be above 11.
    assert records[WARMED, WARM_UP]["curve"][1]["loss"] == pytest.approx(2.125**2, abs=1.0)
    warm = records[WARMED, "qr-all"]
    assert warm["learning_rate"] == default_rate(warm["trainable_parameters"])
    assert warm["settings"]["step_length"] == STEP_LENGTH
    assert records[WARMED, "lora"]["learning_rate"] == 5e-4 and "step_length" not in records[WARMED, "lora"]["settings"]


def test_without_dropout_nothing_is_dropped_and_the_record_says_so(tiny_base: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    ids = torch.tensor([[2, 8, 9, 10, 3]])
    same = {}
    for dropout in (True, False):
        model = Models(checkpoint, "cpu", dropout).fresh(RTE, 2, 3).train()
        with torch.no_grad():
            first, second = (model(input_ids=ids).logits for _ in range(2))
        same[dropout] = torch.equal(first, second)
    assert same == {True: False, False: True}
    with_it, without = (Settings(dropout=dropout).record("RTE", "qr-all") for dropout in (True, False))
    assert without == with_it | {"dropout": False} and "dropout" not in with_it


def test_a_run_that_would_end_too_late_makes_way_for_a_shorter_one(make_job: Callable[..., Job]) -> None:
    job = make_job(methods=("qr-all", "head"), deadline=time.time() + 100)
    work_all(replace(job, plan=job.plan[:1], deadline=None))
    slow = {"model": "tiny", "task": "RTE", "start": WARMED, "method": "qr-all", "seconds": 1e6}
    append_record(job.place.output / "runs_old.jsonl", slow | {"key": "tiny/RTE/warmed/qr-all/0"})
    worker = Worker(replace(job, plan=job.plan[:3]), 0)
    assert worker.take() is True
    with pytest.raises(OutOfTime):
        worker.take()
    assert [record["method"] for record in read_records(job.place.records)] == [WARM_UP, "head"]


def test_tokens_are_those_of_the_tokenizer(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    write_tokens(RTE, str(data), checkpoint, tmp_path / "tokens.safetensors", 32)
    parts, labels = read_tokens(tmp_path / "tokens.safetensors", "cpu")
    examples = read_part(RTE, str(data), "train", None)
    assert labels == ("entailment", "not_entailment") and len(parts["train"]) == 12 and len(parts["dev"]) == 8
    assert parts["train"].targets.tolist() == [0, 1] * 6
    chosen = np.array([7, 2])
    batch = parts["train"].batch(chosen, torch.from_numpy(chosen))
    for row, place in enumerate(chosen):
        expected = checkpoint.tokenizer()(examples.texts[place], examples.pairs[place])  # type: ignore[index]
        length = len(expected["input_ids"])
        for name in expected:
            assert batch[name][row, :length].tolist() == expected[name]
        assert batch["attention_mask"][row].sum() == length
    assert batch["input_ids"].shape[1] % 8 == 0


def test_a_sample_is_the_same_every_time(data: Path) -> None:
    short = replace(RTE, train_rows=5)
    first, again = read_part(short, str(data), "train", None), read_part(short, str(data), "train", None)
    assert len(first) == 5 and first == again
    assert len(read_part(short, str(data), "train", 3)) == 3 and len(read_part(short, str(data), "dev", None)) == 8


def test_f1_is_that_of_the_class_1() -> None:
    logits = np.array([[0, 1], [0, 1], [0, 1], [1, 0]])
    found = scores(TASKS["MRPC"], logits, np.array([1, 1, 0, 0]))
    assert found == {"accuracy": 0.75, "f1": pytest.approx(0.8, abs=1e-6)}


def test_the_schedule_rises_and_falls_as_transformers_does() -> None:
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=6, num_training_steps=100)
    for step in range(100):
        assert factor(step, 100) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_the_loop_gives_the_coefficients_of_train(tiny_base: Path, tiny_basis: Basis, tmp_path: Path) -> None:
    # Whole batches without dropout: the order of the rows does not matter, and only rounding differs.
    folder = tmp_path / "still"
    model = open_checkpoint(str(tiny_base)).load_model()
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(folder)
    open_checkpoint(str(tiny_base)).tokenizer().save_pretrained(folder)
    checkpoint = open_checkpoint(str(folder))
    labels = [LABELS[index % 4] for index in range(6)]
    examples = Examples(list(SENTENCES), None, labels, "sentences")
    settings = TrainSettings(epochs=20, batch_size=6, max_length=32, device="cpu", learning_rate=0.05)
    expected = train(checkpoint, tiny_basis, examples, None, settings, tmp_path / "run").values

    task = Task("tiny", "tiny", ("accuracy",))
    lines = [
        "sentence\tlabel",
        *(f"{text}\t{LABELS.index(label)}" for text, label in zip(SENTENCES, labels, strict=True)),
    ]
    (tmp_path / "tiny").mkdir()
    for part in ("train", "dev"):
        (tmp_path / "tiny" / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    write_tokens(task, str(tmp_path), checkpoint, tmp_path / "tokens", 32)
    parts, _labels = read_tokens(tmp_path / "tokens", "cpu")
    model = checkpoint.load_model()
    adapters = attach(model, tiny_basis)
    precondition(adapters)
    groups = [{"params": [adapter.u for adapter in adapters.values()], "lr": 0.05}]
    trace = train_model(model, groups, task, parts, Schedule(20, 6, 4, 0, bf16=False))
    found = get_coefficients(adapters)
    assert np.abs(expected).max() > 0.1
    # Adam divides by gradients, so rounding in a small one shows; 1e-3 of the largest is far below a step of 0.05.
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert [point["step"] for point in trace.curve] == [0, 5, 10, 15, 20] and trace.steps == 20


def test_rows_come_back_in_their_order(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    write_tokens(RTE, str(data), checkpoint, tmp_path / "tokens", 32)
    rows = read_tokens(tmp_path / "tokens", "cpu")[0]["dev"]
    model = checkpoint.load_model()
    alone = [model(**rows.batch(np.array([i]), torch.tensor([i]))).logits.detach().numpy()[0] for i in range(len(rows))]
    np.testing.assert_allclose(predict(model, rows, bf16=False), np.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHOD_NAMES)
@pytest.mark.parametrize("train_head", [False, True])
def test_a_method_trains_what_it_says_and_starts_as_the_model(tiny_base: Path, name: str, train_head: bool) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    models = Models(checkpoint, "cpu")
    model, untouched = models.fresh(RTE, 2, 3), models.fresh(RTE, 2, 3).eval()
    before = {key: value.clone() for key, value in untouched.state_dict().items()}
    prepared = prepare(METHODS[name], model, checkpoint, train_head, ("a", "b"), 1)
    ids = torch.tensor([[2, 8, 9, 10, 3]])
    with torch.no_grad():
        # PiSSA takes its factors out of the weight and adds them again.
        torch.testing.assert_close(
            prepared.model.eval()(input_ids=ids).logits, untouched(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
    trained = {id(parameter) for group in prepared.groups for parameter in group["params"]}
    assert trained == {id(p) for p in prepared.model.parameters() if p.requires_grad}
    head = sum(before[key].numel() for key in head_names(untouched))
    expected = {"full": sum(p.numel() for p in untouched.parameters()), "head": head}
    adapters = prepared.trainable - (head if train_head else 0)
    assert prepared.trainable == expected[name] if name in expected else 0 < adapters < 20_000
    assert prepared.file_bytes() > 4 * prepared.trainable


@pytest.mark.slow
def test_every_method_runs_and_is_recorded_once(make_job: Callable[..., Job]) -> None:
    job = make_job(tasks=("RTE", "STS-B"))
    work_all(job)
    records = read_records(job.place.records)
    assert [record["key"] for record in records] == [run.key for run in job.plan]
    assert [record for record in records if "error" in record] == []
    for record in records:
        assert record["metrics"] == record["curve"][-1]["metrics"] and len(record["curve"]) == 4
        assert record["file_bytes"] > 4 * record["trainable_parameters"] > 0
    # Every method of a task starts from the same warmed-up model.
    starts = {json.dumps(r["curve"][0]["metrics"]) for r in records if r["start"] == WARMED and r["task"] == "RTE"}
    warm = next(record for record in records if record["key"] == "tiny/RTE/warmed/warm-up/0")
    assert json.dumps(warm["metrics"]) in starts and len(starts) <= 2
    assert Worker(job, 0).take() is None
    table = render_table(records)
    assert table.count("| QR-LoRA, all linear layers |") == 2 and "| the start itself | 0 | 0 |" in table
    names = {path.name for path in plot_curves(records, job.place.output)}
    assert names == {"curve_tiny_RTE.png", "curve_tiny_STS-B.png"}


def test_a_table_gives_mean_and_deviation_and_says_where_seeds_are_missing() -> None:
    def record(task: str, method: str, seed: int, metrics: dict[str, float]) -> dict[str, object]:
        return {
            "key": f"m/{task}/warmed/{method}/{seed}",
            "model": "m",
            "task": task,
            "start": WARMED,
            "method": method,
            "seed": seed,
            "metrics": metrics,
            "trainable_parameters": 600 + seed,
            "file_bytes": 3000,
            "train_seconds": 2.0,
            "peak_bytes": 2**20 * (1 + seed),
            "settings": Settings().record(task, method),
            "device": "cpu",
            "workers": 1,
            "versions": {},
        }

    records = [record("RTE", "qr-q4", seed, {"accuracy": 0.6 + 0.1 * seed}) for seed in range(3)]
    records += [record("MRPC", "qr-q4", seed, {"accuracy": 0.5, "f1": 0.25}) for seed in range(2)]
    failed = record("RTE", "qr-q4", 3, {"accuracy": 0.0}) | {"error": "out of memory"}
    again = record("RTE", "qr-q4", 2, {"accuracy": 0.9})  # the last record of a run counts
    lines = render_table([*records, failed, again]).splitlines()
    assert lines[-1] == (
        "| QR-LoRA, q of the last 4 | 601 | 3,000 | 73.3 ± 15.3 | 50.0 ± 0.0 / 25.0 ± 0.0 (2) | 2.0 | 3 |"
    )
    assert "RTE (accu) | MRPC (accu/f1)" in lines[-3]


def test_a_run_that_fails_is_recorded_and_tried_again_by_the_next_command(make_job: Callable[..., Job]) -> None:
    # Two blocks have no last four.
    job = make_job(methods=("qr-q4", "head"))
    work_all(job)
    errors = {record["key"]: record["error"] for record in read_records(job.place.records) if "error" in record}
    assert set(errors) == {"tiny/RTE/warmed/qr-q4/0", "tiny/RTE/pretrained/qr-q4/0"}
    assert "last_layers must be between 1 and 2" in errors["tiny/RTE/warmed/qr-q4/0"]
    assert Worker(replace(job, launch="second"), 0).take() is True
    assert "QR-LoRA" not in render_table(read_records(job.place.records))


def test_a_run_that_is_held_or_not_ready_is_left(make_job: Callable[..., Job]) -> None:
    job = make_job(methods=("head",))
    warm, after, fresh = job.plan
    with claimed(job.place.claim(warm)) as mine, claimed(job.place.claim(fresh)) as too:
        # The start is being made by another, what needs it has to wait.
        assert mine and too and not job.place.is_ready(after)
        assert Worker(job, 0).take() is False
    assert read_records(job.place.records) == []


def test_the_time_ends_a_run_without_a_record(make_job: Callable[..., Job]) -> None:
    job = make_job(methods=("head",), deadline=time.time() - 1)
    with pytest.raises(OutOfTime):
        Worker(job, 0).take()
    assert read_records(job.place.records) == []


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.glue", "--model", f"tiny={tiny_base}", "--data", str(data)]
    command += ["-o", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--workers", "2", "--seeds", "0"]
    command += ["--tasks", "RTE", "--methods", "head", "qr-all", "lora", "--device", "cpu", "--epochs", "20"]
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    records = tmp_path / "out" / "runs.jsonl"
    until = time.monotonic() + 120
    while len(read_records(records)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = [record["key"] for record in read_records(records)]
    assert 2 <= len(before) < 7
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0 and "7 of 7 runs are done" in again.stderr
    keys = [record["key"] for record in read_records(records)]
    assert len(keys) == len(set(keys)) == 7 and keys[: len(before)] == before
    assert (tmp_path / "out" / "table.md").is_file()


@pytest.mark.gpu
def test_every_method_runs_in_bf16_on_a_gpu(make_job: Callable[..., Job]) -> None:
    job = make_job()
    job = replace(job, device="cuda", settings=replace(job.settings, bf16=True))
    work_all(job)
    records = read_records(job.place.records)
    assert len(records) == len(job.plan) and [record for record in records if "error" in record] == []
    assert all(record["peak_bytes"] > 0 for record in records)


def test_checkpoint_is_one_of_ours(make_job: Callable[..., Job]) -> None:
    job = make_job(methods=("head",))
    assert Worker(job, 0).take() is True
    warmed = open_checkpoint(str(job.place.warmed(job.plan[0])))
    assert isinstance(warmed, Checkpoint) and warmed.has_task_head and len(warmed.labels) == 2
