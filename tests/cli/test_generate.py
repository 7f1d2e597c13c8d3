"""`generate`: prompts, chats, files of requests and a conversation, from a bundle of a decoder."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrlora_deploy.formats.coefficients import write_coefficients
from tests.cli.running import Ran, environment, run, run_here, succeed_here
from tests.runtime.generation.written import Written, write_everything

pytestmark = pytest.mark.makes

PROMPT = "play some music"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_everything(tmp_path_factory.mktemp("written"))


@pytest.fixture
def place(tmp_path: Path, written: Written) -> Iterator[Path]:
    """The current folder: a bundle and a folder of customers."""
    (tmp_path / "bundle").symlink_to(written.bundle)
    written.copied(tmp_path / "customers")
    return tmp_path


def generate(place: Path, *arguments: object) -> Ran:
    return run_here("generate", "bundle", "--customers", "customers", *arguments, cwd=place)


def refuse(place: Path, *arguments: object) -> str:
    """The one line that a command ends with."""
    ran = generate(place, *arguments)
    assert ran.code == 2 and ran.out == "", ran
    (line,) = ran.err.strip().splitlines()
    assert line.startswith("Error: ")
    return line


def test_a_prompt_of_a_customer(place: Path, written: Written) -> None:
    ran = generate(place, "--prompt", PROMPT, "--customer", "one", "--max-tokens", 8)
    assert (ran.code, ran.out) == (0, f" {written.greedy(PROMPT, 'one', 8)}\n")
    streamed = generate(place, "--prompt", PROMPT, "--customer", "one", "--max-tokens", 8, "--stream")
    assert streamed.out == ran.out


def test_several_prompts_in_json(place: Path, written: Written) -> None:
    prompts = ["--prompt", PROMPT, "--prompt", "hello", "--customer", "two", "--customer", "three"]
    asked = ["generate", "bundle", "--customers", "customers", *prompts, "--max-tokens", 5, "--logprobs", 1]
    first, second = succeed_here(asked, place)
    assert [first["customer"], second["customer"]] == ["two", "three"]
    assert first["text"].strip() == written.greedy(PROMPT, "two", 5)
    assert first["customer_digest"] == written.customer("two").digest
    assert first["base_digest"] == written.made.checkpoint.digest
    assert first["completion_tokens"] == len(first["logprobs"]) <= 5


def test_a_chat_goes_through_the_template(place: Path) -> None:
    """The template of the tiny base: `role: content`, a line each, and `assistant:`."""
    chat = generate(place, "--chat", "--system", "be brief", "--prompt", "hi", "--max-tokens", 6)
    text = "system: be brief\nuser: hi\nassistant:"
    by_hand = place / "requests.jsonl"
    by_hand.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    assert chat.code == 0 and chat.out.strip()
    # No special tokens are put around what a template wrote, so the texts differ by these alone.
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(place / "bundle" / "tokenizer.json"))
    from qrlora_deploy.runtime.generation.requests import GenerationRequest
    from qrlora_deploy.runtime.generation.session import GenerationSession

    session = GenerationSession.open(place / "bundle", threads=1)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert session.submit(GenerationRequest(ids, max_tokens=6)).result().text == chat.out.rstrip("\n")


def test_a_seed_repeats_an_answer(place: Path) -> None:
    drawn = ["--prompt", PROMPT, "--temperature", 1.2, "--max-tokens", 10, "--json"]
    first = generate(place, *drawn).json[0]
    again = generate(place, *drawn, "--seed", first["seed"]).json[0]
    assert again == first


def test_a_file_of_requests(place: Path, written: Written) -> None:
    owners = ["one", None, "two", "three"] * 5
    lines = [
        {"prompt": f"{PROMPT} {n}", "max_tokens": 1 + n % 7} | ({"customer": o} if o else {})
        for n, o in enumerate(owners)
    ]
    (place / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran = generate(place, "--jsonl", "requests.jsonl", "-o", "answers.jsonl", "--json")
    assert ran.json == {"output": "answers.jsonl", "answers": 20, "kept": 0, "refused": 0}
    answers = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    assert [answer["customer"] for answer in answers] == owners
    for line, answer in zip(lines, answers, strict=True):
        assert answer["text"].strip() == written.greedy(line["prompt"], line.get("customer"), line["max_tokens"])


def test_a_request_that_is_refused_does_not_cost_the_others(place: Path) -> None:
    lines = [{"prompt": "a", "customer": "one"}, {"prompt": "b", "customer": "nobody"}, {"prompt": "music " * 300}]
    lines += [{"prompt": "c", "custmer": "one"}, {"prompt": ""}, {"prompt": "d", "top_p": 7}, {"prompt": "e"}]
    (place / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"prompt\n')
    ran = generate(place, "--jsonl", "requests.jsonl", "-o", "answers.jsonl", "--max-tokens", 3)
    assert ran.code == 2
    assert ran.err.splitlines()[-1].startswith("Error: answers.jsonl: 6 of 8 requests were refused; the first: ")
    answers = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    assert answers[0]["completion_tokens"] == 3
    assert "no customer 'nobody'" in answers[1]["error"] and "too long" in answers[2]["error"]
    assert (
        'requests.jsonl line 4: there is no "custmer"; did you mean "customer"?' in answers[3]["error"]
        and "is empty" in answers[4]["error"]
    )
    assert 'line 6: "top_p" must be' in answers[5]["error"] and "line 8: " in answers[7]["error"]
    assert answers[6]["completion_tokens"] == 3 and "error" not in answers[6]


def test_an_interrupted_file_is_gone_on_with(place: Path) -> None:
    lines = [{"prompt": f"{PROMPT} {number}", "customer": "one"} for number in range(6)]
    (place / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["--jsonl", "requests.jsonl", "-o", "answers.jsonl", "--max-tokens", 4]
    assert generate(place, *asked).code == 0
    whole = (place / "answers.jsonl").read_text()
    header = _header_of(place, asked)
    (place / "answers.jsonl").unlink()
    (place / "answers.jsonl.partial").write_text(header + "".join(whole.splitlines(keepends=True)[:4]) + '{"custo')
    resumed = generate(place, *asked, "--resume", "--json")
    assert resumed.json["kept"] == 4
    assert (place / "answers.jsonl").read_text() == whole


def _header_of(place: Path, asked: list[object]) -> str:
    """The first line of a part, which says what was asked; a part of other requests is refused, and named."""
    partial = place / "answers.jsonl.partial"
    partial.write_text('{"requests_digest": "of others"}\n')
    assert "answers.jsonl.partial answers other requests" in refuse(place, *asked, "--resume")
    from qrlora_deploy.runtime.bundle.bundle import open_bundle
    from qrlora_deploy.runtime.generation.request_file import AnswerFile, read_generation_requests
    from qrlora_deploy.runtime.generation.requests import GenerationRequest

    manifest = open_bundle(place / "bundle").manifest
    model = {"base": manifest.base_digest, "basis": manifest.basis_digest, "precision": manifest.precision}
    requests = read_generation_requests(place / "requests.jsonl", GenerationRequest(" ", max_tokens=4))
    AnswerFile(place / "answers.jsonl", requests, model).close()
    return partial.read_text()


def talk(place: Path, lines: list[str], *arguments: str) -> Ran:
    """Type lines into a conversation."""
    done = subprocess.run(
        [sys.executable, "-m", "qrlora_deploy.cli", "generate", "bundle", "--max-tokens", "5", *arguments],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        cwd=place,
        env=environment(),
        timeout=120,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def test_a_conversation(place: Path, written: Written) -> None:
    lines = ["hello", f"@two {PROMPT}", "@two", PROMPT, "@nobody hi", "/base", "/customers", "/what", "hello", "/quit"]
    ran = talk(place, [*lines, "not any more"], "--customers", "customers")
    asked = [("hello", None), (PROMPT, "two"), (PROMPT, "two"), ("hello", None)]
    expected = [written.greedy(text, owner, 5) for text, owner in asked]
    assert ran.code == 0 and [line.strip() for line in ran.out.splitlines()] == expected
    for part in ("holds no customer 'nobody'", "there is no /what", "one, three, two"):
        assert part in ran.err
    assert "Traceback" not in ran.err


def test_a_conversation_remembers_a_chat(place: Path) -> None:
    first, second, anew = talk(place, ["hi", "hi", "/new", "hi"], "--chat").out.splitlines()
    assert first == anew != second


def test_bad_input_ends_in_one_line(place: Path, switchable: Path) -> None:
    assert "the prompt is empty" in refuse(place, "--prompt", "")
    assert "the prompt is too long" in refuse(place, "--prompt", "music " * 300)
    assert "holds no customer 'nobody'" in refuse(place, "--prompt", "a", "--customer", "nobody")
    assert "--top-p must be above 0" in refuse(place, "--prompt", "a", "--top-p", 3)
    assert (
        "raise --max-cache-bytes or lower --max-tokens" in generate(place, "--prompt", "a", "--max-cache-bytes", 9).err
    )
    assert "--resume does nothing unless" in refuse(place, "--prompt", "a", "--resume")
    assert "--system does nothing unless" in refuse(place, "--prompt", "a", "--system", "b")
    other = run_here("generate", switchable, "--prompt", "a", cwd=place)
    assert other.code == 2 and "is for text-classification and writes no text" in other.err


def test_predict_refuses_a_decoder(place: Path) -> None:
    ran = run_here("predict", "bundle", "--text", "a", cwd=place)
    assert ran.code == 2
    assert ran.err.strip().splitlines()[-1] == "Error: bundle is a decoder, which writes text; ask it by `generate`"


def test_serve_checks_a_decoder_and_refuses_buckets(place: Path) -> None:
    serve = ("serve", "bundle", "--customers", "customers", "--port", 0, "--insecure", "--max-answers", 2)
    for option in ([], ["--processes", 1]):
        assert run_here(*serve, "--check", *option, cwd=place).code == 0
    ran = run_here(*serve, "--buckets", "1:32", cwd=place)
    assert ran.code == 2 and ran.err.strip().splitlines()[-1].endswith("leave out --buckets")


def test_inspect_counts_the_caches(place: Path) -> None:
    ran = run_here("inspect", "bundle", cwd=place)
    assert "6 caches past_key_values float32 [batch, 2, buffer, 16]" in " ".join(ran.out.split())
    assert "past_key_values.0" not in ran.out
    assert len(run_here("inspect", "bundle", "--json", cwd=place).json["outputs"]) == 8


def test_a_customer_of_another_base_is_named(place: Path, written: Written) -> None:
    stranger = written.coefficients(written.made.values[1], base_digest="e" * 64, basis_digest="f" * 64)
    write_coefficients(stranger, place / "customers" / "stranger.safetensors")
    line = generate(place, "--prompt", "a", "--customer", "stranger").err.splitlines()[-1]
    assert line.startswith("Error: ") and "stranger" in line and "basis" in line
    (place / "requests.jsonl").write_text('{"prompt": "a", "customer": "stranger"}\n{"prompt": "b"}\n')
    ran = generate(place, "--jsonl", "requests.jsonl", "-o", "answers.jsonl", "--max-tokens", 3)
    refused, answered = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    assert ran.code == 2 and "stranger" in refused["error"] and answered["completion_tokens"] == 3


def test_a_base_without_a_chat_template_takes_no_chat(place: Path, written: Written) -> None:
    from qrlora_deploy.errors import MalformedInputError
    from qrlora_deploy.runtime.generation.requests import GenerationRequest
    from qrlora_deploy.runtime.generation.session import GenerationSession

    session = GenerationSession.open(written.bundle, threads=1)
    session._prompts.template = None
    with pytest.raises(MalformedInputError, match="has no chat template, so it takes no messages"):
        session.submit(GenerationRequest([{"role": "user", "content": "hi"}]))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--prompt", "a", "--jsonl", "r"], "one of --prompt and --jsonl"),
        (["--jsonl", "r"], "--jsonl and --output belong together"),
        (["--prompt", "a", "-o", "x"], "--jsonl and --output belong together"),
        (["--prompt", "a", "--customer", "one", "--customer", "two"], "--customer was given 2 times"),
        (["--prompt", "a", "--prompt", "b", "--stream"], "--stream shows one answer"),
        (["--json"], "a conversation prints text"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], text: str, place: Path) -> None:
    (place / "r").write_text('{"prompt": "a"}\n')
    assert text in refuse(place, *arguments)


def test_it_needs_no_pytorch(place: Path) -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['qrlora-deploy', 'generate', 'bundle', '--customers', 'customers', '--prompt', 'a']\n"
        "try:\n    runpy.run_module('qrlora_deploy.cli', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end\n"
        "assert not {'torch', 'transformers', 'onnx'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=place, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_help_names_what_it_takes(place: Path) -> None:
    ran = run("generate", "--help", cwd=place)
    assert ran.code == 0 and "--max-cache-bytes" in ran.out and "@acme TEXT" in ran.out
