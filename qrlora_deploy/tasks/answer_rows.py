"""Rows that are written on, as tokens: what a model reads, and which of it are answers that it learns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qrlora_deploy.chat.template import ChatTemplate, choose_template
from qrlora_deploy.chat.text import ChatText, chat_texts
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.lines import row_of
from qrlora_deploy.data.turns import COMPLETION, Turns
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.tasks.base import IGNORED

Row = dict[str, Any]
Rows = list[Row]


@dataclass(frozen=True)
class AnswerRows:
    """What became of data.

    Attributes:
        rows: `input_ids` and `labels` of each, `IGNORED` where a token is no answer's.
        cut: how many rows of data are longer than what is read.
        unread: how many have no answer in what is read, and are left out.
    """

    rows: Rows
    cut: int = 0
    unread: int = 0

    def remark(self, max_length: int) -> str:
        """What a user may not expect; empty where nothing is."""
        parts = [f"{self.cut} rows are cut at {argument('max_length', max_length)}"] if self.cut else []
        return "; ".join(parts + ([f"{self.unread} of them have no answer before that"] if self.unread else []))


def answer_rows(tokenizer: Any, examples: Examples, max_length: int) -> AnswerRows:
    """Token ids of prompts with their answers, each with the end of text behind it as the tokenizer writes it.

    A prompt is made into tokens by itself, as it is when text is generated. A chat is written by the tokenizer's chat
    template, and its answers reach from where the template asks for one to where it ends it. Where a template writes
    earlier turns otherwise once others follow, each answer is a row of its own.

    Args:
        tokenizer: of the base, a fast one for chats.
        examples: rows with `turns`.
        max_length: tokens of a row; what is behind is cut.

    Raises:
        InputError: the tokenizer has no chat template, or no end of text, or the template refuses a row; or no row has
            an answer within `max_length`.
    """
    made: Rows = []
    cut = unread = 0
    template: ChatTemplate | None = None
    for number, turns in enumerate(examples.turns or (), start=1):
        if turns[-1].role == COMPLETION:
            found = [_plain_row(tokenizer, examples.name, turns)]
        else:
            template = template or _template(tokenizer, examples.name)
            found = _chat_rows(tokenizer, template, f"{row_of(examples.name, number)}", turns)
        kept = [_cut(row, max_length) for row in found]
        learned = [row for row in kept if any(label != IGNORED for label in row["labels"][1:])]
        cut += any(len(row["input_ids"]) > max_length for row in found)
        unread += not learned
        made += learned
    if not made:
        raise InputError(
            f"{examples.name}: no row has an answer within its first {max_length} tokens; "
            f"raise {argument('max_length')}"
        )
    return AnswerRows(made, cut, unread)


def _plain_row(tokenizer: Any, name: str, turns: Turns) -> Row:
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError(f"{name}: the base's tokenizer has no eos_token, so no answer would have an end; set one")
    prompt, whole = (_ids(tokenizer, text) for text in (turns[0].content, turns[0].content + turns[1].content))
    # Together they may have other tokens at the seam than the prompt has alone, which is what generation reads.
    same = whole[: len(prompt)] == prompt and len(whole) > len(prompt)
    answer = whole[len(prompt) :] if same else tokenizer(turns[1].content, add_special_tokens=False)["input_ids"]
    return {"input_ids": prompt + answer + [end], "labels": [IGNORED] * len(prompt) + answer + [end]}


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that something follows: with what the tokenizer puts before texts, not with an end."""
    ids: list[int] = tokenizer(text)["input_ids"]
    behind = tokenizer(text, add_special_tokens=False)["input_ids"]
    while ids and ids[-1] == tokenizer.eos_token_id and behind[-1:] != ids[-1:]:
        ids = ids[:-1]
    return ids


def _template(tokenizer: Any, name: str) -> ChatTemplate:
    source = choose_template(getattr(tokenizer, "chat_template", None))
    if source is None:
        raise InputError(
            f"{name} holds chats, but the base's tokenizer has no chat template; give prompts and completions, or "
            f"put a chat_template.jinja into the base"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("chats need a fast tokenizer (tokenizer.json), which says where its tokens are")
    return ChatTemplate(source, dict(tokenizer.special_tokens_map))


def _chat_rows(tokenizer: Any, template: ChatTemplate, place: str, turns: Turns) -> Rows:
    try:
        texts = chat_texts(template, [{"role": turn.role, "content": turn.content} for turn in turns])
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    return [_located(tokenizer, text) for text in texts]


def _located(tokenizer: Any, text: ChatText) -> Row:
    starts = [start for start, _ in text.answers]
    tokens = _tokens(tokenizer, text.text, [0])
    ids = [token for token, _, _ in tokens]
    alone = [tokenizer(text.text[:start], add_special_tokens=False)["input_ids"] for start in starts]
    if any(ids[: len(prompt)] != prompt for prompt in alone):
        # A token of both prompt and answer: the prompt gets those that it has alone, which is what generation reads.
        tokens = _tokens(tokenizer, text.text, [0, *starts])
    labels = [
        token if any(start <= first < end for start, end in text.answers) else IGNORED for token, first, _ in tokens
    ]
    return {"input_ids": [token for token, _, _ in tokens], "labels": labels}


def _tokens(tokenizer: Any, text: str, starts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Each token with its first character and the one behind its last; parts that begin at `starts` by themselves."""
    found = []
    for start, end in zip(starts, (*starts[1:], len(text)), strict=True):
        encoded = tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True)
        places = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        found += [(token, start + first, start + last) for token, (first, last) in places]
    return found


def _cut(row: Row, max_length: int) -> Row:
    return {name: values[:max_length] for name, values in row.items()}
