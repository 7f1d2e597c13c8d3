"""Rows that are written on: prompts with completions, and chats. Each row is a tuple of turns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qrlora_deploy.data.columns import LABEL_COLUMNS, TEXT_COLUMNS
from qrlora_deploy.data.labels import is_unicode
from qrlora_deploy.data.lines import row_of
from qrlora_deploy.data.readers import Columns
from qrlora_deploy.errors import InputError, argument, shortened

PROMPT, COMPLETION, ASSISTANT = "prompt", "completion", "assistant"
"""Roles: of the two turns of a plain row, and of the turns of a chat that are answers."""

CHAT_COLUMN = "messages"
PROMPT_COLUMNS = ((PROMPT, COMPLETION), (PROMPT, "response"), ("instruction", "output"), ("question", "answer"))
MESSAGE_KEYS = {"role", "content"}


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: "prompt" and "completion" of a plain row; of a chat "system", "user", "assistant", or another one that
            the chat template knows.
        content: the text, with its blanks.
    """

    role: str
    content: str

    @property
    def is_answer(self) -> bool:
        """Whether it is what a model is to write."""
        return self.role in (COMPLETION, ASSISTANT)


Turns = tuple[Turn, ...]


def turn_columns(
    source: str, columns: Columns, text_column: str | None, label_column: str | None, wanted: bool = False
) -> tuple[str, ...]:
    """The column of chats, or those of prompts and completions; empty where the rows are none of these.

    Args:
        source: what errors name.
        columns: of the table.
        text_column: the column of prompts or of chats, where the user named it.
        label_column: that of completions.
        wanted: whether the rows must be such.

    Raises:
        InputError: they must be, and it is not clear which columns are meant.
    """
    if text_column is None and label_column is None:
        if CHAT_COLUMN in columns and _has_messages(columns[CHAT_COLUMN]):
            return (CHAT_COLUMN,)
        # A table of labelled pairs may have a question and an answer, too.
        if wanted or not any(name in columns for name in (*LABEL_COLUMNS, *TEXT_COLUMNS)):
            pair = next((pair for pair in PROMPT_COLUMNS if all(name in columns for name in pair)), None)
            if pair is not None and (wanted or pair[0] == PROMPT):
                return pair
            if PROMPT in columns:
                raise InputError(
                    f"{source} has prompts and no answers to learn: add a column {COMPLETION}, or name one by "
                    f"{argument('label_column')} with {argument('text_column', PROMPT)}"
                )
    elif text_column in columns and _has_messages(columns[text_column]):
        return (text_column,)
    elif wanted and text_column in columns and label_column in columns:
        return (text_column, label_column)
    if not wanted:
        return ()
    raise InputError(
        f"{source}: which columns are prompts and answers? It has {', '.join(list(columns)[:12])}; name them by "
        f"{argument('text_column')} and {argument('label_column')}, or give chats in a column {CHAT_COLUMN}"
    )


def read_turns(source: str, names: tuple[str, ...], columns: Columns) -> list[Turns]:
    """The turns of each row.

    Args:
        source: what errors name.
        names: of one column of chats, or of prompts and completions.
        columns: the table.

    Raises:
        InputError: a row has no text, no answer, or a message that is none; the row is named.
    """
    if len(names) == 1:
        return [_chat(source, row, value) for row, value in enumerate(columns[names[0]], start=1)]
    pairs = zip(columns[names[0]], columns[names[1]], strict=True)
    return [_plain(source, names, row, *pair) for row, pair in enumerate(pairs, start=1)]


def _plain(source: str, names: tuple[str, ...], row: int, prompt: Any, completion: Any) -> Turns:
    for name, value in zip(names, (prompt, completion), strict=True):
        if value is None:
            raise _wrong(source, row, f"has no {name}, as others have; every row needs {names[0]} and {names[1]}")
        if not isinstance(value, str):
            raise _wrong(source, row, f"has no text in the column {name}")
        _check_unicode(source, row, value)
    if not completion:
        raise _wrong(source, row, f"has an empty {names[1]}; every row needs an answer to learn")
    return Turn(PROMPT, prompt), Turn(COMPLETION, completion)


def _chat(source: str, row: int, value: Any) -> Turns:
    if value is None:
        raise _wrong(source, row, "has no messages, as others have; a file holds chats, or prompts with completions")
    if not isinstance(value, list) or not value:
        raise _wrong(source, row, f"has no list of messages: {_shown(value)}")
    turns = tuple(_message(source, row, message) for message in value)
    if not any(turn.is_answer for turn in turns):
        raise _wrong(source, row, f"has no message of the role {ASSISTANT}; every chat needs an answer to learn")
    return turns


def _message(source: str, row: int, message: Any) -> Turn:
    if not isinstance(message, dict):
        raise _wrong(source, row, f"has a message that is no object: {_shown(message)}")
    others = sorted(name for name, value in message.items() if name not in MESSAGE_KEYS and value is not None)
    if others:
        raise _wrong(source, row, f"has a message with {', '.join(map(str, others))}; role and content alone are read")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role or not isinstance(content, str):
        raise _wrong(source, row, f"has a message without a role and a text as content: {_shown(message)}")
    if role in (PROMPT, COMPLETION):
        raise _wrong(source, row, f"has a message of the role {role}; write user and {ASSISTANT}")
    _check_unicode(source, row, content)
    return Turn(role, content)


def _has_messages(values: Sequence[Any]) -> bool:
    first = next((value for value in values if value is not None), None)
    return isinstance(first, list) and bool(first) and isinstance(first[0], dict) and "role" in first[0]


def _check_unicode(source: str, row: int, text: str) -> None:
    if not is_unicode(text):
        raise _wrong(source, row, "has a text that is not valid Unicode (half a surrogate pair)")


def _wrong(source: str, row: int, what: str) -> InputError:
    return InputError(f"{row_of(source, row)} {what}")


def _shown(value: Any) -> str:
    return shortened(repr(value), 80)
