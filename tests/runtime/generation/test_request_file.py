"""Files of requests and of their answers: what a line may say, order, and going on after an interruption."""

import contextlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrlora_deploy.errors import FileFormatError, InputError, QrloraError
from qrlora_deploy.runtime.generation.request_file import AnswerFile, read_generation_requests
from qrlora_deploy.runtime.generation.requests import GenerationRequest
from qrlora_deploy.runtime.generation.sampling import Sampling
from tests.damaging import damaged_bytes

DEFAULTS = GenerationRequest(" ", "acme", Sampling(temperature=0.5, seed=3), 20, ["END"])
MODEL = {"base": "0" * 64}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def test_a_line_says_what_is_otherwise(tmp_path: Path) -> None:
    path = write(
        tmp_path / "requests.jsonl",
        {"prompt": "a", "stop": "one text"},
        {"messages": [{"role": "user", "content": "b"}], "customer": "bolt", "max_tokens": 3, "top_k": 2, "stop": []},
        {"prompt": "c", "temperature": 0, "seed": 9},
    )
    first, second, third = read_generation_requests(path, DEFAULTS)
    assert first == GenerationRequest("a", "acme", Sampling(temperature=0.5, seed=3), 20, ["one text"])
    chat = [{"role": "user", "content": "b"}]
    assert second == GenerationRequest(chat, "bolt", Sampling(temperature=0.5, seed=3, top_k=2), 3, [])
    assert third == GenerationRequest("c", "acme", Sampling(temperature=0, seed=9), 20, ["END"])


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ({}, 'a line needs either "prompt" or "messages"'),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, 'either "prompt" or "messages"'),
        ({"messages": []}, "messages"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "a", "top_p": 2}, '"top_p" must be above 0'),
        ({"prompt": "a", "max_tokens": 0}, '"max_tokens" must be'),
        ({"prompt": "a", "custmer": "one"}, 'there is no "custmer"; did you mean "customer"?'),
        ({"prompt": "a", "stop": ""}, '"stop" must hold texts'),
        ({"prompt": "a", "stop": 3}, "stop"),
        ({"prompt": "a", "customer": "../x"}, "x"),
        (["a"], "object"),
    ],
)
def test_a_bad_line_is_named_and_costs_no_other(line: object, text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "requests.jsonl", {"prompt": "good"}, line, {"prompt": "too"})
    first, refused, last = read_generation_requests(path, DEFAULTS)
    assert isinstance(first, GenerationRequest) and isinstance(last, GenerationRequest)
    assert isinstance(refused, FileFormatError)
    assert str(refused).startswith(f"{path} line 2: ") and text in str(refused)
    assert "\n" not in str(refused)


def test_lines_that_are_no_text_cost_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qrlora_deploy.runtime.generation.request_file.MAX_LINE_BYTES", 40)
    path = tmp_path / "requests.jsonl"
    long = json.dumps({"prompt": "a" * 200}).encode()
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n' + long + b'\n{"prompt"\n{"prompt": "b"}\n')
    first, *refused, last = read_generation_requests(path, DEFAULTS)
    assert [one.prompt for one in (first, last) if isinstance(one, GenerationRequest)] == ["a", "b"]
    parts = ("line 2 is not UTF-8 text", "line 3 is longer", "line 4: ")
    assert len(refused) == 3 and all(part in str(one) for part, one in zip(parts, refused, strict=True))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no requests"):
        read_generation_requests(path, DEFAULTS)
    with pytest.raises(InputError, match="cannot be read"):
        read_generation_requests(tmp_path / "none.jsonl", DEFAULTS)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32))
def test_damaged_files_are_read_or_refused(tmp_path: Path, seed: int) -> None:
    content = write(tmp_path / "whole.jsonl", {"prompt": "a", "top_k": 3}, {"prompt": "é"}).read_bytes()
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(damaged_bytes(content, random.Random(seed)))
    try:
        read_generation_requests(path, DEFAULTS)
    except InputError as error:
        assert "\n" not in str(error)


def requests_of(count: int) -> list[GenerationRequest]:
    return [GenerationRequest(str(number)) for number in range(count)]


def record(number: int) -> dict[str, object]:
    return {"text": f"é\n{number}", "finish_reason": "stop"}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(8)), st.integers(0, 8), st.integers(0, 30))
def test_answers_come_in_order_and_an_interruption_loses_none_that_was_written(
    tmp_path: Path, order: list[int], until: int, cut: int
) -> None:
    path = tmp_path / "answers.jsonl"
    first = AnswerFile(path, requests_of(8), MODEL)
    for number in order[:until]:
        first.add(number, record(number))
    whole_lines = first.done
    first.close()
    # The last line may have been written in part.
    with first.partial.open("ab") as file:
        file.write((json.dumps(record(whole_lines)) + "\n").encode()[:cut])
    second = AnswerFile(path, requests_of(8), MODEL, resume=True)
    assert second.done in (whole_lines, min(whole_lines + (cut >= 40), 8))
    for number in range(7, second.done - 1, -1):
        second.add(number, record(number))
    assert list(second.records()) == [record(number) for number in range(8)]
    second.finish()
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert found == [record(number) for number in range(8)]
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"]
    path.unlink()


@pytest.mark.parametrize("other", ["requests", "model"])
def test_answers_to_other_requests_are_not_gone_on_with(other: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, requests_of(3), MODEL).close()
    asked, model = (requests_of(4), MODEL) if other == "requests" else (requests_of(3), {"base": "1" * 64})
    with pytest.raises(InputError, match=r"answers.jsonl.partial answers other requests.*leave out resume"):
        AnswerFile(path, asked, model, resume=True)
    assert AnswerFile(path, asked, model).done == 0


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = AnswerFile(path, requests_of(2), MODEL)
    first.add(0, record(0))
    for resume in (True, False):
        with pytest.raises(InputError, match=r"another process is writing .*answers.jsonl: it holds .*\.partial"):
            AnswerFile(path, requests_of(2), MODEL, resume=resume)
    first.add(1, record(1))
    first.finish()
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [record(0), record(1)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl", requests_of(1), MODEL)
    with Path("/dev/full").open("ab") as full:
        monkeypatch.setattr(file, "_file", full)
        with pytest.raises(QrloraError, match=r"cannot write .*answers.jsonl.partial: No space left on device"):
            file.add(0, record(0))
        with contextlib.suppress(OSError):
            full.close()


def test_answers_of_an_interrupted_run_are_not_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = AnswerFile(path, requests_of(2), MODEL)
    first.add(0, record(0))
    first.close()
    with pytest.raises(InputError, match=r"holds 1 answers of an interrupted run.*resume=True, or remove it"):
        AnswerFile(path, requests_of(2), MODEL)
    again = AnswerFile(path, requests_of(2), MODEL, resume=True)
    assert again.done == 1
    again.close()
    for content in (b"", again.partial.read_bytes()[:20]):  # cut before there was an answer
        again.partial.write_bytes(content)
        for resume in (True, False):
            begun = AnswerFile(path, requests_of(2), MODEL, resume=resume)
            assert begun.done == 0 and begun.partial.read_bytes().endswith(b"}\n")
            begun.close()
            begun.partial.write_bytes(content)
    again.partial.write_text("half of a download")
    with pytest.raises(InputError, match=r"\.partial already exists and is no part of a file of answers"):
        AnswerFile(path, requests_of(2), MODEL)


def test_only_answers_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("my own notes")
    with pytest.raises(InputError, match="is no file of answers"):
        AnswerFile(path, requests_of(1), MODEL)
    path.write_text('{"text": "a", "finish_reason": "stop"}\n')
    AnswerFile(path, requests_of(1), MODEL).close()
