"""Prompts with completions and chats as they are read: what is taken for them, and what is refused by its row."""

import json
from pathlib import Path
from typing import Any

import pytest

from qrlora_deploy.data.examples import read_examples
from qrlora_deploy.data.turns import Turn
from qrlora_deploy.errors import InputError

CHAT = [{"role": "user", "content": " hi"}, {"role": "assistant", "content": "yo "}]


def lines(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_blanks_of_prompts_and_completions_stay(tmp_path: Path) -> None:
    found = read_examples(lines(tmp_path, {"prompt": "a: ", "completion": " b\n", "id": 7}))
    assert found.turns == [(Turn("prompt", "a: "), Turn("completion", " b\n"))]
    assert (found.texts, found.labels, found.pairs, found.words) == ([""], [""], None, None)
    other = read_examples(lines(tmp_path, {"prompt": "a:", "completion": " b\n"}))
    assert found.digest != other.digest and found.take([0, 0]).turns == (found.turns or []) * 2


def test_a_table_of_prompts_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\n"a,\nb",c\n')
    assert read_examples(tmp_path / "a.csv").turns == [(Turn("prompt", "a,\nb"), Turn("completion", "c"))]


def test_chats_are_read(tmp_path: Path) -> None:
    found = read_examples(lines(tmp_path, {"messages": CHAT, "label": "x"}))
    assert found.turns == [(Turn("user", " hi"), Turn("assistant", "yo "))]
    assert read_examples(lines(tmp_path, {"talk": CHAT}), "talk", written=True).turns == found.turns


def test_columns_of_other_names_are_prompts_where_that_is_asked_for(tmp_path: Path) -> None:
    path = lines(tmp_path, {"question": "a", "answer": "b", "text": "c", "label": "d"})
    assert read_examples(path).turns is None
    asked = [read_examples(path, written=True), read_examples(path, "question", "answer", written=True)]
    assert [each.turns for each in asked] == [[(Turn("prompt", "a"), Turn("completion", "b"))]] * 2
    assert read_examples(path, "text", "label", written=True).turns == [(Turn("prompt", "c"), Turn("completion", "d"))]
    with pytest.raises(InputError, match=r"a.jsonl: which columns are prompts and answers\? It has a, b; name them by"):
        read_examples(lines(tmp_path, {"a": "x", "b": "y"}), written=True)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no completion": ({"prompt": "a", "completion": None}, "has no completion, as others have"),
    "an empty completion": ({"prompt": "a", "completion": ""}, "has an empty completion; every row needs an answer"),
    "a number": ({"prompt": 3, "completion": "b"}, "has no text in the column prompt"),
    "half a pair": ({"prompt": "\ud800", "completion": "b"}, r"has a text that is not valid Unicode"),
}
WRONG_CHATS: dict[str, tuple[Any, str]] = {
    "no list": ("hi", "has no list of messages: 'hi'"),
    "empty": ([], r"has no list of messages: \[\]"),
    "no answer": (CHAT[:1], "has no message of the role assistant; every chat needs an answer"),
    "no object": (["hi"], "has a message that is no object: 'hi'"),
    "no content": ([{"role": "assistant"}], "has a message without a role and a text as content"),
    "parts": ([{"role": "assistant", "content": [{"type": "text"}]}], "has a message without a role and a text"),
    "a tool": ([{"role": "assistant", "content": "", "tool_calls": [1]}], "has a message with tool_calls; role and"),
    "a role of rows": ([{"role": "completion", "content": "x"}], "has a message of the role completion; write user"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rows_are_named(tmp_path: Path, name: str) -> None:
    row, told = WRONG[name]
    with pytest.raises(InputError, match=rf"a.jsonl line 2 {told}"):
        read_examples(lines(tmp_path, {"prompt": "a", "completion": "b"}, row))


@pytest.mark.parametrize("name", WRONG_CHATS)
def test_wrong_chats_are_named(tmp_path: Path, name: str) -> None:
    value, told = WRONG_CHATS[name]
    with pytest.raises(InputError, match=rf"a.jsonl line 2 {told}"):
        read_examples(lines(tmp_path, {"messages": CHAT}, {"messages": value}))


def test_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n")
    with pytest.raises(InputError, match=r"a.csv holds no rows"):
        read_examples(path)


def test_prompts_beside_chats_are_named_once(tmp_path: Path) -> None:
    mixed = lines(tmp_path, {"messages": CHAT}, {"prompt": "a", "completion": "b"})
    with pytest.raises(InputError, match="has no messages, as others have") as caught:
        read_examples(mixed)
    assert str(caught.value).startswith(f"{mixed} line 2 has") and "row" not in str(caught.value).split(";")[0]


def test_prompts_alone_ask_for_answers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has prompts and no answers to learn: add a column completion"):
        read_examples(lines(tmp_path, {"prompt": "a"}, {"prompt": "b"}))
