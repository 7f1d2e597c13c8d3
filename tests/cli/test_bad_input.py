"""Bad input ends in exit code 1 or 2 and one line, and leaves nothing half-written."""

import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from qrlora_deploy.cli import output as output_module
from qrlora_deploy.formats.basis import Basis, write_basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.io.files import write_tensors
from tests.cli.running import run, run_here
from tests.forging import forge
from tests.tiny import LABELS, SENTENCES

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so nothing is refused")


@pytest.fixture
def place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_base: Path,
    tiny_basis_file: Path,
    tiny_customer_file: Path,
    exported: Path,
) -> Path:
    """The current folder: a base, its basis, a customer, a bundle, and data, good and bad."""
    shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copytree(exported, tmp_path / "bundle")
    shutil.copy(tiny_basis_file, tmp_path / "basis.safetensors")
    shutil.copy(tiny_customer_file, tmp_path / "acme.safetensors")
    rows = [f"{sentence}\t{LABELS[index % 4]}" for index, sentence in enumerate(SENTENCES)]
    (tmp_path / "good.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", "utf-8")
    (tmp_path / "stranger.tsv").write_text("text\tlabel\nhello\tno such label\n", "utf-8")
    (tmp_path / "empty.tsv").write_text("text\tlabel\n", "utf-8")
    (tmp_path / "latin.tsv").write_bytes("text\tlabel\ncafé\ttravel\n".encode("latin-1"))
    (tmp_path / "customers").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "report.json").write_text('{"format": "of somebody else"}', "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(place: Path, command: str, *words: str) -> str:
    """Run a command that must fail in one line that holds `words`, and change no file; returns the line."""
    before = contents(place)
    shown = run_here(*command.split(), cwd=place)
    assert shown.code in (1, 2), shown.err
    lines = shown.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: "), shown.err
    assert shown.out == "" and "internal error" not in lines[0]
    assert [word for word in words if word not in lines[0]] == [], lines[0]
    assert contents(place) == before
    return lines[0]


def contents(place: Path) -> dict[str, int]:
    return {path.relative_to(place).as_posix(): path.stat().st_size for path in place.rglob("*")}


TRAIN = "train base --basis basis.safetensors -o new.safetensors --data"

NOT_OURS = "already exists and is no"

CASES = {
    "basis onto the base": ("factorize base -o base/model.safetensors", "model.safetensors", NOT_OURS, "basis"),
    "basis onto a customer": ("factorize base -o acme.safetensors", "acme.safetensors", NOT_OURS, "basis"),
    "customer onto its data": (f"{TRAIN} good.tsv -o good.tsv", "good.tsv", NOT_OURS, "coefficients file"),
    "customer onto the basis": (f"{TRAIN} good.tsv -o basis.safetensors", "basis.safetensors", NOT_OURS),
    "customer onto the graph": (f"{TRAIN} good.tsv -o bundle/model.onnx", "model.onnx", NOT_OURS),
    "sum onto the basis": ("combine acme.safetensors:2 -o basis.safetensors", "basis.safetensors", NOT_OURS),
    "packed onto a customer": ("pack customers --bundle bundle -o acme.safetensors", "acme.safetensors", NOT_OURS),
    "adapter onto the data": (
        "export base --basis basis.safetensors --coefficients acme.safetensors --format onnx-adapter -o good.tsv",
        "good.tsv already exists",
    ),
    "report onto another one": ("bench bundle -o foreign", "report.json", "already exists and is no report of bench"),
    "unknown layer": ("factorize base -o new.safetensors --target qery", "qery", "attention.self.query"),
    "broken expression": ("factorize base -o new.safetensors --target qu(ery", "qu(ery"),
    "tau too large": ("factorize base -o new.safetensors --tau 1.5", "tau", "1.5"),
    "tau and rank": ("factorize base -o new.safetensors --tau 0.5 --rank 4", "--tau", "--rank"),
    "no rank": ("factorize base -o new.safetensors --rank 0", "rank"),
    "no base": ("factorize nowhere -o new.safetensors", "nowhere"),
    "no option": ("factorize base", "--output"),
    "output is a folder": ("factorize base -o base", "base"),
    "output folder missing": ("factorize base -o no/such/new.safetensors", "no/such"),
    "no data": (f"{TRAIN} nothing.tsv", "nothing.tsv"),
    "empty data": (f"{TRAIN} empty.tsv", "empty.tsv"),
    "missing column": (f"{TRAIN} good.tsv --text-column body", "body", "text"),
    "not UTF-8": (f"{TRAIN} latin.tsv", "latin.tsv", "row 1 is not UTF-8"),
    "unknown label": (f"{TRAIN} stranger.tsv", "no such label", "travel"),
    "nothing to resume": (f"{TRAIN} good.tsv --resume", "--resume"),
    "learning rate": (f"{TRAIN} good.tsv --learning-rate 1e38", "--learning-rate"),
    "length": (f"{TRAIN} good.tsv --max-length 1000", "--max-length", "64"),
    "metric": (f"{TRAIN} good.tsv --eval good.tsv --metric bleu", "bleu", "accuracy"),
    "merge over a folder": ("merge --coefficients acme.safetensors -o bundle", "bundle"),
    "not merged": ("merge --unmerge base --coefficients acme.safetensors -o new", "base"),
    "export without a basis": ("export base -o new", "--basis"),
    "export of a customer without --merge": ("export --coefficients acme.safetensors -o new", "--merge"),
    "export --merge without a customer": ("export base --merge -o new", "--coefficients"),
    "more head labels than none": (
        "export --merge --coefficients acme.safetensors --head-labels 5 -o new",
        "--head-labels",
    ),
    "a table in a merged bundle": (
        "export --merge --coefficients acme.safetensors --table-dtype fp16 -o new",
        "--table-dtype",
        "switchable",
    ),
    "a table for PEFT": (
        "export --format peft --coefficients acme.safetensors --table-dtype fp16 -o new",
        "--table-dtype",
        "peft",
    ),
    "unknown exporter": ("export --merge --coefficients acme.safetensors --format tflite -o new", "tflite", "onnx"),
    "not a bundle": ("verify base", "base", "manifest.json"),
    "not a file of ours": ("inspect base/model.safetensors", "the weights of a model"),
    "no such file": ("inspect nothing.safetensors", "nothing.safetensors"),
    "bad picture": ("inspect basis.safetensors --plot basis.txt", "basis.txt", ".png"),
    "odd pairs": ("predict bundle --text a --text b --pair c", "--pair"),
    "no text": ("predict bundle", "--text"),
    "lone option": ("verify bundle --data good.tsv", "--coefficients"),
    "unknown command": ("prdict bundle", "prdict"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line(place: Path, case: str) -> None:
    command, *words = CASES[case]
    refuse(place, command, *words)


@no_gpu
@pytest.mark.parametrize(
    "command",
    [
        f"{TRAIN} good.tsv --device cuda",
        "factorize base -o new.safetensors --device cuda",
        "warmup base --data good.tsv -o new --device cuda",
        "verify bundle --provider cuda",
        "predict bundle --text hello --provider cuda",
        "export --merge --coefficients acme.safetensors -o new --provider cuda",
        "quickstart --device cuda --out new",
    ],
)
def test_cuda_where_there_is_none(place: Path, command: str) -> None:
    refuse(place, command, "cuda" if "--device" in command else "CUDAExecutionProvider")


def with_nan(path: Path, customer: Coefficients) -> None:
    values = customer.values.copy()
    values[3] = np.nan
    forge(path, path, lambda metadata, tensors: tensors.update(coefficients=values))


def too_short(path: Path, customer: Coefficients) -> None:
    forge(path, path, lambda metadata, tensors: tensors.update(coefficients=customer.values[:-1].copy()))


def cut(path: Path, customer: Coefficients) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def huge_header(path: Path, customer: Coefficients) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def foreign(path: Path, customer: Coefficients) -> None:
    write_tensors(path, {"coefficients": customer.values}, {"format": "other", "format_version": 1})


def empty(path: Path, customer: Coefficients) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [with_nan, too_short, cut, huge_header, foreign, empty])
@pytest.mark.parametrize(
    "command",
    [
        "merge base --basis basis.safetensors --coefficients acme.safetensors -o new",
        "export --merge --coefficients acme.safetensors -o new",
    ],
)
def test_damaged_customer(
    place: Path,
    tiny_customer: Coefficients,
    damage: Callable[[Path, Coefficients], None],
    command: str,
) -> None:
    damage(place / "acme.safetensors", tiny_customer)
    refuse(place, command, "acme.safetensors")


def test_damaged_basis(place: Path) -> None:
    whole = (place / "basis.safetensors").read_bytes()
    (place / "basis.safetensors").write_bytes(whole[: len(whole) // 2])
    refuse(place, f"{TRAIN} good.tsv", "basis.safetensors")


def test_wrong_basis(place: Path, tiny_basis: Basis) -> None:
    first, *rest = tiny_basis.targets
    other = type(first)(first.name, -first.q, -first.r, first.diagonal, first.weight_digest)
    wrong = type(tiny_basis)((other, *rest), tiny_basis.base_name, tiny_basis.rule, tiny_basis.versions)
    write_basis(wrong, place / "other.safetensors")
    command = "merge base --basis other.safetensors --coefficients acme.safetensors -o new"
    refuse(place, command, tiny_basis.digest[:12], wrong.digest[:12])


def test_another_base(place: Path) -> None:
    file = place / "base" / "model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-5] ^= 1
    file.write_bytes(whole)
    refuse(place, "export base --merge --coefficients acme.safetensors -o new", "digest")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "reference.safetensors"])
def test_tampered_bundle(place: Path, name: str) -> None:
    file = place / "bundle" / name
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    refuse(place, "predict bundle --text hello", name, "changed")


FULL_DISK = {
    "factorize": ("factorize base -o new.safetensors", 2048),
    "train": (f"{TRAIN} good.tsv --epochs 1 --max-length 32", 256),
    "merge": ("merge --coefficients acme.safetensors -o new", 8192),
    "export": ("export --merge --coefficients acme.safetensors -o new", 8192),
    "warmup": ("warmup base --data good.tsv --epochs 1 --max-length 32 -o new", 8192),
}


@pytest.mark.parametrize("name", FULL_DISK)
def test_full_disk(place: Path, name: str) -> None:
    command, limit = FULL_DISK[name]
    before = contents(place)

    def small_disk() -> None:
        # Writing past the limit fails with EFBIG, as a full disk does with ENOSPC. Python ignores the signal.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    ran = run(*command.split(), cwd=place, prepare=small_disk)
    assert ran.code == 1, ran.err
    assert ran.err.startswith("Error: ") and len(ran.err.splitlines()) == 1, ran.err
    assert "internal error" not in ran.err
    assert contents(place) == before


def test_a_file_of_the_same_kind_and_an_empty_one_are_replaced(place: Path) -> None:
    (place / "empty.safetensors").touch()
    shutil.copy(place / "acme.safetensors", place / "bolt.safetensors")
    (place / "old.safetensors").symlink_to("bolt.safetensors")
    before = (place / "acme.safetensors").read_bytes()
    for output in ("empty.safetensors", "old.safetensors"):
        shown = run_here("combine", "acme.safetensors:2", "-o", output, cwd=place)
        assert shown.code == 0, shown.err
        assert not (place / output).is_symlink() and (place / output).read_bytes() != before
    assert (place / "bolt.safetensors").read_bytes() == before


def test_files_of_other_tools_are_told_by_what_they_look_like(place: Path) -> None:
    safetensors.numpy.save_file({"base_model.model.x.lora_A.weight": np.zeros(2, np.float32)}, "adapter.safetensors")
    (place / "peft").mkdir()
    (place / "peft" / "adapter_config.json").write_text("{}")
    (place / "model.gguf").write_bytes(b"GGUF\x03\0\0\0")
    refuse(place, "inspect adapter.safetensors", "is an adapter of PEFT, which this project writes")
    refuse(place, "inspect peft", "is an adapter of PEFT")
    refuse(place, "inspect base/model.safetensors", "is the weights of a model; inspect the folder")
    refuse(place, "inspect model.gguf", "is a GGUF file")


def test_a_table_under_the_name_of_another_kind_is_told(place: Path) -> None:
    (place / "tabs.csv").write_text("text\tlabel\nplay music\thome\n")
    (place / "commas.tsv").write_text("text,label\nplay music,home\n")
    refuse(place, f"{TRAIN} tabs.csv", "tabs.csv: its header has tabs; name the file .tsv")
    refuse(place, f"{TRAIN} commas.tsv", "commas.tsv: its header has commas; name the file .csv")


def test_options_that_would_do_nothing_are_refused(place: Path) -> None:
    refuse(place, f"{TRAIN} good.tsv --metric f1", "--metric does nothing unless there is --eval")
    bf16 = "export base --basis basis.safetensors --precision bf16 -o new"
    refuse(place, bf16, "cpu cannot run a graph in bf16", "--provider cuda")


@pytest.fixture(autouse=True)
def _no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine what is refused late takes long enough for a line."""
    monkeypatch.setattr(output_module, "LINE_SECONDS", 1e9)


def test_long_work_shows_lines_where_stderr_is_no_terminal(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output_module, "LINE_SECONDS", 0.0)
    with output_module.progress_bar() as progress:
        assert progress is not None
        progress("warm up", 3, 10)
    assert capsys.readouterr().err == "warm up: 3 of 10\n"


def test_a_step_that_begins_in_long_work_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output_module, "LINE_SECONDS", 10.0)
    clock = iter([0.0, 5.0, 11.0, 12.0, 12.5])
    monkeypatch.setattr(output_module.time, "monotonic", lambda: next(clock))
    with output_module.progress_bar() as progress:
        assert progress is not None
        for description, done in (("export", 0), ("export", 1), ("parity check", 2), ("parity check", 3)):
            progress(description, done, 4)
    assert capsys.readouterr().err == "export: 1 of 4\nparity check: 2 of 4\n"
