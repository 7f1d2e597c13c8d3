"""What `generate` and its conversation have in common."""

from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from qrlora_deploy.runtime.generation.requests import GenerationAnswer, GenerationRequest
    from qrlora_deploy.runtime.generation.session import GenerationSession


def as_chat(text: str, system: str | None) -> list[dict[str, str]]:
    """What a user says as messages."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def show_stream(session: "GenerationSession", request: "GenerationRequest", stdout: IO[str]) -> "GenerationAnswer":
    """Write an answer to `stdout` while it is written; returns it.

    Raises:
        QrloraError: it was refused or failed.
    """
    stream = session.submit(request)
    try:
        for event in stream:
            stdout.write(event.text)
            stdout.flush()
    finally:
        stream.cancel()
    answer = stream.result()
    stdout.write("\n")
    return answer
