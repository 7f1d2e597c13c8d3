"""Chat templates: the text of transformers' own rendering, and nothing that a template may not do."""

import json
import threading
from pathlib import Path

import pytest

from qrlora_deploy.chat.template import ChatTemplate, read_chat_template
from qrlora_deploy.chat.text import chat_texts
from qrlora_deploy.errors import FileFormatError, InputError, MissingPartError
from tests.chat.templates import FAMILIES, LLAMA, QWEN, SMOL

TOKENS = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
CHATS = [
    [{"role": "user", "content": " hi \n"}],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello {{ 7 * 7 }} é"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ],
    [{"role": "system", "content": "be <b>"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
]


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_that_of_transformers(name: str, asks: bool) -> None:
    pytest.importorskip("transformers")
    from tests.tiny_decoder import build_byte_pairs

    tokenizer = build_byte_pairs(FAMILIES[name])
    template = ChatTemplate(FAMILIES[name], dict(tokenizer.special_tokens_map))
    written = 0
    for chat in CHATS:
        for more in ({}, {"enable_thinking": False}):
            try:
                expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=asks, **more)
            except Exception as error:
                with pytest.raises(InputError, match="the chat template refuses the chat: System role not supported"):
                    template.render(chat, asks, **more)
                assert "System role" in str(error)
                continue
            assert template.render(chat, asks, **more) == expected
            written += 1
    assert written == (6 if name == "gemma" else 8)


def test_files_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    from tests.tiny_decoder import build_byte_pairs

    build_byte_pairs(LLAMA).save_pretrained(tmp_path)
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(CHATS[3], tokenize=False)
    template = read_chat_template(tmp_path)
    assert template is not None and template.render(CHATS[3]) == expected and expected.startswith("<|endoftext|>")
    (tmp_path / "chat_template.jinja").unlink()
    assert read_chat_template(tmp_path) is None
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": LLAMA}]
    older = config | {"chat_template": named, "bos_token": {"content": "<|endoftext|>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(older))
    template = read_chat_template(tmp_path)
    assert template is not None and template.render(CHATS[3]) == expected
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(FileFormatError, match=r"tokenizer_config.json must hold a JSON object"):
        read_chat_template(tmp_path)


STOPPED = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "written in a loop": "{% for a in range(99999) %}" + "x" * 5000 + "{% endfor %}",
    "doubled by ~": "{% set n = namespace(x='ab') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubled by +": "{% set n = namespace(x='ab') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled by a block": "{% set n = namespace(x='ab') %}{% for a in range(60) %}{% set y %}{{ n.x }}{{ n.x }}"
    "{% endset %}{% set n.x = y %}{% endfor %}",
    "doubled lists": "{% set n = namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "joined lists": "{% set n = namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "times": "{{ 'a' * 99999999999 }}",
    "times in a list": "{{ [0] * 99999999999 }}",
    "power": "{{ 9 ** 999999999 }}",
    "squares": "{% set n = namespace(x=9) %}{% for a in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent by argument": "{{ '%*d' % (999999999, 1) }}",
    "replaced": "{% set x = 'a' * 4000000 %}{{ x.replace('a', x) }}",
    "replaced by a filter": "{% set x = 'a' * 4000000 %}{{ x | replace('a', x) }}",
    "joined": "{{ ('a' * 4000000).join(range(99999) | list) }}",
    "joined by a filter": "{{ range(99999) | join('a' * 4000000) }}",
    "indented": "{{ [1] | tojson(indent=999999999) }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "macros of macros": "{% macro a() %}" + "x" * 9000 + "{% endmacro %}"
    "{% for b in range(99999) %}{{ a() }}{% endfor %}",
    "a recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a date of any width": "{{ strftime_now('%999999999d') }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "format by a subscript": "{{ 'a'['format'](1) }}",
    "wide methods": "{{ 'a'.center(999999999) }}",
    "bytes of a number": "{{ (1).to_bytes(999999999, 'big') }}",
    "wide filters": "{{ 'a' | center(999999999) }}",
    "wide filters by map": "{{ ['a'] | map('center', 999999999) | list }}",
    "insides": "{{ ''.__class__.__mro__ }}",
    "insides by a filter": "{{ '' | attr('__class__') }}",
    "insides of a function": "{{ raise_exception.__globals__.x }}",
    "changes": "{{ messages.append(1) }}",
    "changes of a message": "{{ messages[0].update(role='x') }}",
    "files": "{% include '/etc/passwd' %}",
    "lines": "{{ lipsum(999999) }}",
    "a broken one": "{% for %}",
    "wrong types": "{{ 1 + 'a' }}",
    "nothing there": "{{ messages[9].content.x }}",
}


@pytest.mark.parametrize("name", STOPPED)
def test_what_a_template_may_not_do_ends_in_one_line(name: str) -> None:
    chat = [{"role": "user", "content": "hi"}]
    with pytest.raises(InputError, match="the chat template (refuses the chat|was stopped|cannot be used): ") as caught:
        ChatTemplate(STOPPED[name], {}).render(chat)
    assert "\n" not in str(caught.value) and chat == [{"role": "user", "content": "hi"}]


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qrlora_deploy.chat.budget.MAX_SECONDS", 0.0)
    with pytest.raises(InputError, match="the chat template was stopped: it takes more than 0 seconds"):
        ChatTemplate(SMOL, {}).render(CHATS[0])


def test_long_templates_and_chats_are_refused() -> None:
    with pytest.raises(InputError, match="the chat template has 300,000 characters; 262,144 are the most"):
        ChatTemplate("x" * 300_000, {})
    with pytest.raises(InputError, match="a chat may have 10,000 messages and 4,194,304 characters at most"):
        ChatTemplate(SMOL, {}).render([{"role": "user", "content": "x" * 5_000_000}])


def test_a_long_chat_is_written() -> None:
    chat = [{"role": ("user", "assistant")[place % 2], "content": "word " * 400} for place in range(400)]
    assert len(ChatTemplate(QWEN, TOKENS).render(chat)) > 800_000


def test_several_threads_render_at_once() -> None:
    template, found = ChatTemplate(QWEN, TOKENS), []

    def render() -> None:
        found.extend(template.render(CHATS[2]) for _ in range(20))

    threads = [threading.Thread(target=render) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and set(found) == {template.render(CHATS[2])}


def test_answers_lie_where_the_template_puts_them() -> None:
    (text,) = chat_texts(ChatTemplate(SMOL, TOKENS), CHATS[2])
    assert [text.text[start:end] for start, end in text.answers] == [
        "<think>\nhm\n</think>\n\nb<|im_end|>",
        "d<|im_end|>",
    ]
    assert text.text == ChatTemplate(SMOL, TOKENS).render(CHATS[2])


def test_turns_that_are_written_otherwise_later_are_rows_of_their_own() -> None:
    template = ChatTemplate(QWEN, TOKENS)
    first, second = chat_texts(template, CHATS[2])
    assert first.text == template.render(CHATS[2][:2]) and second.text == template.render(CHATS[2])
    assert [text.text[slice(*text.answers[0])] for text in (first, second)] == [
        "<think>\nhm\n</think>\n\nb<|im_end|>",
        "<think>\n\n</think>\n\nd<|im_end|>",
    ]


def test_a_template_that_asks_otherwise_than_it_writes_is_refused() -> None:
    odd = "{% for m in messages %}{{ m.content }};{% endfor %}{% if add_generation_prompt %}BOT:{% endif %}"
    with pytest.raises(InputError, match="the chat template does not go on from where it asks for answer 2 of"):
        chat_texts(ChatTemplate(odd, {}), CHATS[1])


def test_without_jinja2_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qrlora_deploy.installation.parts.lacking", lambda modules: list(modules))
    with pytest.raises(MissingPartError, match=r"a chat template needs Jinja2.*pip install 'qrlora-deploy\[llm\]'"):
        ChatTemplate(SMOL, {})
