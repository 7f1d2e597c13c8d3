"""`predict` on switchable bundles: each text answered for its customer, from options, a file or a conversation."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from qrlora_deploy.formats.coefficients import write_coefficients
from qrlora_deploy.runtime import Predictor, open_bundle
from tests.cli.running import environment, run, run_here, succeed
from tests.runtime.fire import made_up_customer
from tests.tiny import SENTENCES

DEADLINE_S = 60.0
"""Far more than a file takes to go live; a test that waits for so long has failed."""

OWN_LABELS = {"acme": None, "bolt": 3, "city": 6}
"""Customers by the labels of their own heads; None uses the base's."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switchable: Path, exported: Path) -> Path:
    """The current folder: a switchable bundle, a merged one and a folder of three customers."""
    (tmp_path / "bundle").symlink_to(switchable)
    (tmp_path / "merged").symlink_to(exported)
    (tmp_path / "customers").mkdir()
    for name in OWN_LABELS:
        put(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(place: Path, name: str, version: int = 1) -> None:
    manifest = open_bundle(place / "bundle").manifest
    seed = 10 * version + list(OWN_LABELS).index(name)
    customer = made_up_customer(manifest, seed, OWN_LABELS[name])
    write_coefficients(customer, place / "customers" / f"{name}.safetensors")


def expected(place: Path, texts: list[str], owners: list[str | None]) -> list[dict[str, object]]:
    """The library's own answers, as the command prints them."""
    predictor = Predictor(open_bundle(place / "bundle"))
    assert predictor.switchable is not None
    for name in OWN_LABELS:
        predictor.switchable.load(name, place / "customers" / f"{name}.safetensors")
    return [
        {"customer": owner, "text": text, "label": answer.label, "labels": [answer.label]}
        | {"score": answer.score, "logits": list(answer.logits)}
        for text, owner, answer in zip(texts, owners, predictor.predict(texts, customers=owners), strict=True)
    ]


# --- Options and files ------------------------------------------------------------------------------------------------

PREDICT = ("predict", "bundle", "--customers", "customers")


def test_one_customer_for_all_texts(place: Path) -> None:
    texts = list(SENTENCES[:3])
    options = [part for text in texts for part in ("--text", text)]
    answers = succeed([*PREDICT, "--customer", "acme", *options], place)
    assert answers == expected(place, texts, ["acme"] * 3)


def test_a_customer_for_each_text(place: Path) -> None:
    owners = ["bolt", "acme", "bolt"]
    options = [
        part for text, name in zip(SENTENCES, owners, strict=False) for part in ("--text", text, "--customer", name)
    ]
    answers = succeed([*PREDICT, *options], place)
    assert answers == expected(place, list(SENTENCES[:3]), owners)
    assert {len(answer["logits"]) for answer in answers} == {3, 4}


def test_without_a_customer_the_base_answers(place: Path) -> None:
    with_folder = succeed([*PREDICT, "--text", SENTENCES[0]], place)
    without = succeed(["predict", "bundle", "--text", SENTENCES[0]], place)
    assert with_folder == without == expected(place, [SENTENCES[0]], [None])


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_a_file_of_requests_of_many_customers(place: Path, batch_size: int) -> None:
    owners = [None, "acme", "bolt", "city", None, "city", "acme", "bolt", None, "acme"]
    texts = [SENTENCES[index % len(SENTENCES)] for index in range(len(owners))]
    # A separator of lines in Unicode, but not in JSON Lines.
    texts[3] = "play\u2028music"
    requests = [
        {"text": text, "ignored": [1]} | ({"customer": owner} if owner or index else {})
        for index, (text, owner) in enumerate(zip(texts, owners, strict=True))
    ]
    lines = [json.dumps(request, ensure_ascii=False) for request in requests]
    (place / "requests.jsonl").write_text("\ufeff" + "\r\n\n".join(lines) + "\n", "utf-8")
    answers = succeed([*PREDICT, "--requests", "requests.jsonl", "--batch-size", batch_size], place)
    wanted = expected(place, texts, owners)
    assert [(answer["customer"], answer["text"], answer["label"]) for answer in answers] == [
        (answer["customer"], answer["text"], answer["label"]) for answer in wanted
    ]
    for answer, other in zip(answers, wanted, strict=True):
        # Other batches pad otherwise, which may change the last bits.
        assert answer["logits"] == pytest.approx(other["logits"], rel=1e-4, abs=1e-4)


def test_text_output_names_the_customer(place: Path) -> None:
    ran = run(*PREDICT, "--customer", "bolt", "--text", SENTENCES[0], cwd=place)
    assert ran.code == 0 and ran.err == ""
    assert all(word in ran.out for word in ("customer", "bolt", SENTENCES[0], "label", "score"))


# --- Bad input --------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "unknown customer": ([*PREDICT, "--customer", "nope", "--text", "a"], ["'nope'", "nope.safetensors"]),
    "a way out": ([*PREDICT, "--customer", "../x", "--text", "a"], ["'../x'", "no customer id"]),
    "a place on this machine": ([*PREDICT, "--customer", "/etc/passwd", "--text", "a"], ["no customer id"]),
    "hidden": ([*PREDICT, "--customer", ".acme", "--text", "a"], ["no customer id"]),
    "no name": ([*PREDICT, "--customer", "", "--text", "a"], ["no customer id"]),
    "long name": ([*PREDICT, "--customer", "x" * 5000, "--text", "a"], ["no customer id"]),
    "two lines": ([*PREDICT, "--customer", "a\nb", "--text", "a"], ["no customer id"]),
    "merged bundle with customers": (
        ["predict", "merged", "--customers", "customers", "--text", "a"],
        ["merged", "--customers"],
    ),
    "no folder": (["predict", "bundle", "--customer", "acme", "--text", "a"], ["--customer needs --customers"]),
    "folder is missing": (["predict", "bundle", "--customers", "nowhere", "--text", "a"], ["nowhere"]),
    "folder is a file": (["predict", "bundle", "--customers", "bad.jsonl", "--text", "a"], ["bad.jsonl"]),
    "names and texts": (
        [*PREDICT, "--customer", "acme", "--customer", "bolt", "--text", "a", "--text", "b", "--text", "c"],
        ["--customer was given 2 times", "--text 3"],
    ),
    "names and requests": ([*PREDICT, "--customer", "acme", "--requests", "good.jsonl"], ["exclude each other"]),
    "texts and requests": ([*PREDICT, "--text", "a", "--requests", "good.jsonl"], ["one of --text, --requests"]),
    "requests without a folder": (["predict", "bundle", "--requests", "good.jsonl"], ["good.jsonl", "--customers"]),
    "requests for a merged bundle": (["predict", "merged", "--requests", "good.jsonl"], ["good.jsonl", "--customers"]),
    "bad line": ([*PREDICT, "--requests", "bad.jsonl"], ["bad.jsonl line 2"]),
    "line of another kind": ([*PREDICT, "--requests", "list.jsonl"], ["list.jsonl line 1"]),
    "text that is a number": ([*PREDICT, "--requests", "number.jsonl"], ["number.jsonl line 1", "text"]),
    "hostile request": ([*PREDICT, "--requests", "hostile.jsonl"], ["'../x'", "no customer id"]),
    "unknown in requests": ([*PREDICT, "--requests", "unknown.jsonl"], ["'nope'"]),
    "some with a pair": ([*PREDICT, "--requests", "pairs.jsonl"], ["some requests have a pair"]),
    "no requests": ([*PREDICT, "--requests", "empty.jsonl"], ["holds no requests"]),
    "not text": ([*PREDICT, "--requests", "latin.jsonl"], ["latin.jsonl", "UTF-8"]),
    "bytes that are no text": ([*PREDICT, "--text", "caf\udce9"], ["not UTF-8"]),
    "json of a conversation": ([*PREDICT, "--repl", "--json"], ["--repl", "--json"]),
    "conversation with nobody": ([*PREDICT, "--repl", "--customer", "nope"], ["'nope'"]),
    "damaged file": ([*PREDICT, "--customer", "cut", "--text", "a"], ["cut.safetensors"]),
}
FILES = {
    "good.jsonl": '{"text": "a", "customer": "acme"}\n',
    "bad.jsonl": '{"text": "a"}\n{"text": \n',
    "list.jsonl": "[1]\n",
    "number.jsonl": '{"text": 1}\n',
    "hostile.jsonl": '{"text": "a", "customer": "../x"}\n',
    "unknown.jsonl": '{"text": "a"}\n{"text": "a", "customer": "nope"}\n',
    "pairs.jsonl": '{"text": "a", "pair": "b"}\n{"text": "a"}\n',
    "empty.jsonl": "\n\n",
}


@pytest.fixture
def bad(place: Path) -> Path:
    for name, content in FILES.items():
        (place / name).write_text(content, "utf-8")
    (place / "latin.jsonl").write_bytes('{"text": "café"}\n'.encode("latin-1"))
    whole = (place / "customers" / "acme.safetensors").read_bytes()
    (place / "customers" / "cut.safetensors").write_bytes(whole[:-7])
    return place


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(bad: Path, case: str) -> None:
    arguments, words = REFUSED[case]
    shown = run_here(*arguments, cwd=bad)
    assert shown.code == 2, shown.err
    lines = [line for line in shown.err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("Error: ") and len(lines[0]) < 500, shown.err
    assert [word for word in words if word not in lines[0]] == [], lines[0]
    assert shown.out == ""


@pytest.mark.parametrize(
    "case", ["unknown customer", "a way out", "bad line", "bytes that are no text", "damaged file"]
)
def test_refused_in_a_process_of_its_own(bad: Path, case: str) -> None:
    arguments, words = REFUSED[case]
    ran = run(*arguments, cwd=bad)
    assert ran.code == 2 and ran.out == ""
    assert len(ran.err.splitlines()) == 1 and all(word in ran.err for word in words), ran.err


# --- The conversation -------------------------------------------------------------------------------------------------


class Conversation:
    """`predict --repl` in a process, typed into line by line."""

    def __init__(self, process: "subprocess.Popen[str]", errors: Path) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process, self._errors = process, errors
        self._in: IO[str] = process.stdin
        self._out: IO[str] = process.stdout

    def say(self, line: str) -> None:
        self._in.write(f"{line}\n")
        self._in.flush()

    def ask(self, text: str) -> str:
        """The answer's line: label and score."""
        self.say(text)
        return self._out.readline().strip()

    def errors(self) -> str:
        return self._errors.read_text("utf-8")

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, self.errors()
            time.sleep(0.02)

    def end(self) -> int:
        """End of the input; what the process ends with."""
        with contextlib.suppress(BrokenPipeError):
            self._in.close()
        return self.process.wait(DEADLINE_S)


@pytest.fixture
def talk(place: Path) -> Iterator[Conversation]:
    errors = place / "stderr.txt"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "qrlora_deploy.cli", *PREDICT, "--repl"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            errors="surrogateescape",
            cwd=place,
            env=environment(),
        )
    try:
        yield Conversation(process, errors)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def line_of(place: Path, text: str, owner: str | None) -> str:
    """What the conversation prints for an answer."""
    [answer] = expected(place, [text], [owner])
    return f"{answer['label']}\t{answer['score']:.4f}"


def test_a_conversation_with_several_customers(place: Path, talk: Conversation) -> None:
    text = SENTENCES[2]
    assert talk.ask(text) == line_of(place, text, None)
    talk.say("/customers")
    answers = {}
    for name in ("acme", "bolt", "acme"):
        talk.say(f"/customer {name}")
        answers[name] = talk.ask(text)
        assert answers[name] == line_of(place, text, name)
    assert len(set(answers.values())) == 2
    talk.say("/customers")
    talk.say("/help")
    talk.say("")
    talk.say("/base")
    assert talk.ask(text) == line_of(place, text, None)
    talk.say("/quit")
    assert talk.process.wait(DEADLINE_S) == 0
    shown = talk.errors()
    assert "acme, bolt, city\n" in shown and "acme (loaded), bolt (loaded), city\n" in shown
    assert shown.count("/customer NAME switches") == 2
    assert "acme> " in shown and "base> " in shown and "Error" not in shown


def test_an_error_is_a_line_and_the_conversation_goes_on(place: Path, talk: Conversation) -> None:
    text = SENTENCES[2]
    talk.say("/customer acme")
    before = talk.ask(text)
    for line in ("/customer nope", "/customer ../x", "/customer", "/nonsense", "/customer a b"):
        talk.say(line)
    # Who it was before, it still is.
    assert talk.ask(text) == before == line_of(place, text, "acme")
    # A byte that is no UTF-8.
    assert talk.ask("caf\udce9").count("\t") == 1
    assert talk.end() == 0
    shown = talk.errors()
    assert shown.count("Error: ") == 5 and "Traceback" not in shown and "internal error" not in shown
    for part in ("no customer 'nope'", "'../x' is no customer id", "/customer needs a name", "there is no /nonsense"):
        assert part in shown


def test_a_file_that_is_replaced_goes_live_during_the_conversation(place: Path, talk: Conversation) -> None:
    text = SENTENCES[2]
    of_bolt = line_of(place, text, "bolt")
    talk.say("/customer acme")
    first = talk.ask(text)
    put(place, "acme", version=2)
    second = line_of(place, text, "acme")
    assert second != first
    talk.until(lambda: "loaded: " in talk.errors())
    assert talk.ask(text) == second
    # A damaged one does not; what was loaded stays, and the conversation says so.
    damaged = place / "customers" / "damaged"
    damaged.write_bytes((place / "customers" / "acme.safetensors").read_bytes()[:-7])
    shutil.move(damaged, place / "customers" / "acme.safetensors")
    talk.until(lambda: "refused: " in talk.errors())
    assert talk.ask(text) == second
    # A new customer needs no restart, and one that is deleted is gone.
    shutil.copy(place / "customers" / "bolt.safetensors", place / "customers" / "dune.safetensors")
    talk.say("/customer dune")
    assert talk.ask(text) == of_bolt
    (place / "customers" / "dune.safetensors").unlink()
    talk.until(lambda: "removed: " in talk.errors())
    talk.say(text)
    talk.until(lambda: "no customer 'dune'" in talk.errors())
    assert talk.end() == 0


def test_a_conversation_with_a_merged_bundle(place: Path) -> None:
    lines = f"{SENTENCES[0]}\n/customers\n/customer acme\n/base\n{SENTENCES[0]}\n/exit\nnever answered\n"
    ran = subprocess.run(
        [sys.executable, "-m", "qrlora_deploy.cli", "predict", "merged", "--repl"],
        input=lines,
        capture_output=True,
        text=True,
        cwd=place,
        env=environment(),
        timeout=DEADLINE_S,
        check=False,
    )
    answer = Predictor(open_bundle(place / "merged")).predict([SENTENCES[0]])[0]
    assert ran.returncode == 0
    assert ran.stdout.splitlines() == [f"{answer.label}\t{answer.score:.4f}"] * 2
    assert ran.stderr.count("Error: ") == 1 and "merged bundle" in ran.stderr


def test_a_line_without_end_is_read_to_a_bound_and_the_rest_is_no_text() -> None:
    import io

    from qrlora_deploy.cli import repl

    lines = io.StringIO("a" * (repl.MAX_LINE + 5) + "\nhello\n")
    assert [len(repl.read_line(lines)) for _ in range(3)] == [repl.MAX_LINE, 6, 0]
