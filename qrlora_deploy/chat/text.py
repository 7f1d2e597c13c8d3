"""A chat as the text that a model reads, and where in it the answers are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qrlora_deploy.chat.template import ChatTemplate
from qrlora_deploy.errors import InputError
from qrlora_deploy.tokenization.words import Place

Message = Mapping[str, str]

ASSISTANT = "assistant"


@dataclass(frozen=True)
class ChatText:
    """A chat written by a template.

    Attributes:
        text: all of it.
        answers: first character of each answer and the one behind its last, which ends what the model writes: the
            mark of a turn's end is part of it, line breaks behind that are not.
    """

    text: str
    answers: tuple[Place, ...]


def chat_texts(template: ChatTemplate, messages: Sequence[Message]) -> list[ChatText]:
    """A chat with all its answers in one text; or, where the template writes earlier turns otherwise once others
    follow, as some do with their thoughts, a text for each answer, as the model would have read it.

    Raises:
        InputError: the template refuses the chat, or does not go on from where it asks for an answer.
    """
    places = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
    pieces = [_answer(template, messages, place) for place in places]
    last = pieces[-1]
    if all(last.text.startswith(piece.text) for piece in pieces):
        return [ChatText(last.text, tuple(place for piece in pieces for place in piece.answers))]
    return pieces


def _answer(template: ChatTemplate, messages: Sequence[Message], place: int) -> ChatText:
    """The chat up to one answer, and where that is."""
    before = template.render(messages[:place], add_generation_prompt=True)
    through = template.render(messages[: place + 1])
    if not through.startswith(before):
        raise InputError(
            f"the chat template does not go on from where it asks for answer {place + 1} of the chat, so it is not "
            f"clear where the answer begins; give prompts and completions instead"
        )
    return ChatText(through, ((len(before), len(through.rstrip("\r\n"))),))
