"""`qrlora-deploy generate`."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from qrlora_deploy.cli.generated import as_chat, show_stream
from qrlora_deploy.cli.options import (
    ANY_PATH,
    EXISTING_FILE,
    FOLDER,
    CustomerId,
    common,
    provider_option,
    refuse_idle,
    tell_if_interrupted,
)
from qrlora_deploy.cli.output import Output, progress_bar
from qrlora_deploy.cli.ranges import COUNT, FiniteRange, WholeRange
from qrlora_deploy.cli.sampling_options import SAMPLING, sampling_options
from qrlora_deploy.cli.sections import SectionedCommand
from qrlora_deploy.errors import InputError, QrloraError, fields_for_arguments

if TYPE_CHECKING:
    from qrlora_deploy.runtime.generation.request_file import Asked
    from qrlora_deploy.runtime.generation.requests import GenerationAnswer, GenerationRequest
    from qrlora_deploy.runtime.generation.session import GenerationSession


SECONDS = FiniteRange(min=0, min_open=True, max=10**9)


SECTIONS = {
    "prompt": "Prompts and customers",
    "max_tokens": "Where an answer ends",
    "temperature": "How tokens are chosen",
    "max_rows": "Memory and devices",
}
"""Titles of the help by the first option of each part."""


@click.command("generate", cls=SectionedCommand, sections=SECTIONS)
@click.argument("bundle", type=FOLDER)
@click.option("--prompt", multiple=True, help="A text to go on from; repeatable.")
@click.option("--jsonl", type=EXISTING_FILE, help='JSON Lines with "prompt" or "messages", "customer", "max_tokens"...')
@click.option("-o", "--output", type=ANY_PATH, help="File of the answers to --jsonl, a line each, in its order.")
@click.option("--resume", is_flag=True, help="Go on with the answers that an interrupted run has written.")
@click.option("--customers", type=FOLDER, help="Folder of coefficients files, <customer>.safetensors.")
@click.option(
    "--customer", "names", multiple=True, type=CustomerId(), help="Whose the prompts are: once, or once per prompt."
)
@click.option("--chat", is_flag=True, help="Prompts are what a user says; the base's chat template writes the text.")
@click.option("--system", help="With --chat: what the system says first.")
@click.option("--stream", is_flag=True, help="Show an answer while it is written.")
@click.option(
    "--max-tokens", type=COUNT, default=256, show_default=True, help="An answer ends after so many, at the latest."
)
@click.option("--timeout-s", type=SECONDS, help="Seconds after which an answer ends as it is.")
@click.option("--stop", multiple=True, help="A text before which answers end; repeatable.")
@sampling_options
@click.option("--max-rows", type=COUNT, default=8, show_default=True, help="Answers that are written side by side.")
@click.option(
    "--max-cache-bytes",
    type=WholeRange(1, 2**50),
    default=2**30,
    show_default=True,
    help="Memory of keys and values of all rows; more rows than fit wait.",
)
@provider_option
@common
def command(
    bundle: Path,
    prompt: tuple[str, ...],
    jsonl: Path | None,
    output: Path | None,
    resume: bool,
    customers: Path | None,
    names: tuple[str, ...],
    chat: bool,
    system: str | None,
    stream: bool,
    max_tokens: int,
    timeout_s: float | None,
    stop: tuple[str, ...],
    max_rows: int,
    max_cache_bytes: int,
    provider: str,
    **sampling: Any,
) -> Output:
    """Write text by the decoder in BUNDLE: ONNX Runtime and a tokenizer, no PyTorch.

    Without --prompt and --jsonl lines are read from the terminal, each for the customer that it names: `@acme TEXT`.

    \b
    Examples:
      qrlora-deploy generate bundle --customers customers --customer acme --prompt "Where is my parcel?" --chat
      qrlora-deploy generate bundle --customers customers --jsonl requests.jsonl -o answers.jsonl
      qrlora-deploy generate bundle --customers customers --chat
    """
    _check_usage(prompt, jsonl, output, customers, names, stream)
    refuse_idle(["resume"], jsonl is not None, "there is --jsonl")
    refuse_idle(["system"], chat, "there is --chat")
    from qrlora_deploy.runtime.generation.requests import GenerationRequest
    from qrlora_deploy.runtime.generation.sampling import Sampling
    from qrlora_deploy.runtime.generation.session import GenerationSession

    only = names[0] if len(names) == 1 else None
    chosen = Sampling(**{name: sampling[name] for name in SAMPLING})
    defaults = GenerationRequest(" ", only, chosen, max_tokens, stop, timeout_s)
    asked: list[Asked] = []
    if jsonl is not None:
        from qrlora_deploy.runtime.generation.request_file import read_generation_requests

        asked = read_generation_requests(jsonl, defaults)
    if customers is None and any(isinstance(one, GenerationRequest) and one.customer is not None for one in asked):
        raise InputError(f"{jsonl} names customers; give --customers, the folder with the coefficients files")
    from qrlora_deploy.cli.repl import report

    options = {"provider": provider, "max_rows": max_rows, "max_cache_bytes": max_cache_bytes}
    session = GenerationSession.open(bundle, customers, report, **options)
    if jsonl is not None and output is not None:
        return _answer_file(session, asked, output, resume)
    if prompt:
        return _answer(session, _requests(defaults, prompt, names, chat, system), stream)
    from qrlora_deploy.cli.generate_repl import Conversation

    return Output([], live=Conversation(session, defaults, chat, system).converse)


def _check_usage(
    prompts: tuple[str, ...],
    jsonl: Path | None,
    output: Path | None,
    customers: Path | None,
    names: tuple[str, ...],
    stream: bool,
) -> None:
    as_json = click.get_current_context().params["as_json"]
    if prompts and jsonl is not None:
        raise click.UsageError("give the prompts by one of --prompt and --jsonl")
    if (jsonl is None) != (output is None):
        raise click.UsageError("--jsonl and --output belong together: the requests and the file of their answers")
    if len(names) not in (0, 1, len(prompts)):
        raise click.UsageError(f"--customer was given {len(names)} times and --prompt {len(prompts)} times")
    if names and customers is None:
        raise click.UsageError("--customer needs --customers, the folder with the coefficients files")
    if stream and (len(prompts) > 1 or jsonl is not None or as_json):
        raise click.UsageError(
            "--stream shows one answer as text; leave it out with several prompts, --jsonl and --json"
        )
    if as_json and not prompts and jsonl is None:
        raise click.UsageError("a conversation prints text and no --json; give --prompt, or --jsonl a file for that")


def _requests(
    defaults: "GenerationRequest",
    prompts: tuple[str, ...],
    names: tuple[str, ...],
    chat: bool,
    system: str | None,
) -> "list[GenerationRequest]":
    from dataclasses import replace

    owners = [names[index % len(names)] if names else None for index in range(len(prompts))]
    return [
        replace(defaults, prompt=as_chat(text, system) if chat else text, customer=owner)
        for text, owner in zip(prompts, owners, strict=True)
    ]


def _answer(session: "GenerationSession", asked: "list[GenerationRequest]", stream: bool) -> Output:
    from qrlora_deploy.runtime.generation.request_file import answer_record

    if stream:
        return Output([], live=lambda stdout: _stream(session, asked[0], stdout))
    with session:
        answers = session.answers(asked)
    failure = _failure([answer.error for answer in answers])
    record = [answer_record(answer) for answer in answers]
    if click.get_current_context().params["as_json"]:
        return Output(record, failure=failure)

    def show(stdout: IO[str]) -> None:
        stdout.write(_as_text(answers))

    return Output(record, live=show, failure=failure)


def _stream(session: "GenerationSession", request: "GenerationRequest", stdout: IO[str]) -> None:
    with session:
        show_stream(session, request, stdout)


def _as_text(answers: "Iterable[GenerationAnswer]") -> str:
    """The texts, under the names of their customers where there are several."""
    good = [answer for answer in answers if answer.error is None]
    if len(good) == 1:
        return f"{good[0].text}\n"
    return "\n".join(f"{answer.customer or 'base'}>{answer.text}\n" for answer in good)


def _failure(errors: "list[QrloraError | None]") -> QrloraError | None:
    """What the command ends with, where requests were refused: the first one's error, and how many there are."""
    refused = [(number, error) for number, error in enumerate(errors, start=1) if error is not None]
    if not refused:
        return None
    number, error = refused[0]
    if len(errors) == 1:
        return error
    return type(error)(f"{len(refused)} of {len(errors)} requests were refused; the first is number {number}: {error}")


def _answer_file(session: "GenerationSession", asked: "Sequence[Asked]", path: Path, resume: bool) -> Output:
    from qrlora_deploy.runtime.generation.request_file import FIELDS, AnswerFile, answer_record

    manifest = session.bundle.manifest
    model = {"base": manifest.base_digest, "basis": manifest.basis_digest, "precision": manifest.precision}
    file = AnswerFile(path, asked, model, resume)
    tell_if_interrupted(lambda: f"{file.done} of {len(asked)} answers are in {file.partial}; --resume goes on")
    kept = file.done
    with session, progress_bar() as progress, closing(file), fields_for_arguments(FIELDS):
        for number, answer in _numbered(session, asked, kept):
            file.add(number, answer_record(answer))
            if progress is not None:
                progress("answers", file.done, len(asked))
        refused = [record["error"] for record in file.records() if "error" in record]
        file.finish()
    record = {"output": str(path), "answers": len(asked), "kept": kept, "refused": len(refused)}
    failure = None
    if refused:
        failure = InputError(f"{path}: {len(refused)} of {len(asked)} requests were refused; the first: {refused[0]}")
    return Output(record, f"wrote {path}", {"answers": len(asked), "refused": len(refused)}, failure=failure)


def _numbered(
    session: "GenerationSession", asked: "Sequence[Asked]", first: int
) -> "Iterator[tuple[int, GenerationAnswer]]":
    """Answers as they end, by the number of their request; lines that are none first."""
    from qrlora_deploy.runtime.generation.request_file import refusal

    left = list(enumerate(asked))[first:]
    for number, one in left:
        if isinstance(one, QrloraError):
            yield number, refusal(one, session.bundle.manifest.base_digest)
    numbers = [number for number, one in left if not isinstance(one, QrloraError)]
    for event in session.generate(one for _, one in left if not isinstance(one, QrloraError)):
        if event.answer is not None:
            yield numbers[event.number], event.answer
