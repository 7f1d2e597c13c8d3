"""Text and JSON from outside: bounded in size and depth, of whole characters; what the system refuses is one line."""

import os
import threading
from pathlib import Path

import pytest

from qrlora_deploy.errors import FileFormatError, InputError, library_errors
from qrlora_deploy.io.reading import MAX_NESTING, is_file, parse_json, read_text, readable


def test_text_is_read_whole_and_no_further_than_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("é" * 100_000, "utf-8")
    assert read_text(path) == "é" * 100_000
    assert read_text(path, 200_000) == "é" * 100_000
    with pytest.raises(FileFormatError, match=r"a\.txt is larger than 199999 bytes"):
        read_text(path, 199_999)
    path.write_bytes(b"abc\xff")
    with pytest.raises(FileFormatError, match=r"a\.txt is not UTF-8 text: invalid start byte at byte 3"):
        read_text(path)


def test_a_file_with_holes_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "giant").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(FileFormatError, match="is larger than 1000 bytes"):
        read_text(tmp_path / "giant", 1000)


def test_a_pipe_is_text_like_any_other(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("{}",))
    writer.start()
    assert read_text(tmp_path / "pipe") == "{}"
    writer.join()


@pytest.mark.parametrize("name", ["none", "x" * 5_000, ".", "a/b"])
def test_what_the_system_refuses_is_an_input_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be read: ") as caught:
        read_text(tmp_path / name)
    assert len(str(caught.value)) < 500
    assert not is_file(tmp_path / name)


def test_the_reason_is_the_system_s_where_a_library_has_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: Is a directory"), readable(tmp_path):
        raise FileNotFoundError(f"No such file or directory: {tmp_path}")


@pytest.mark.parametrize("brackets", ["[]", '{"a":}'])
def test_nesting_is_bounded(brackets: str) -> None:
    left, right = brackets[:-1], brackets[-1]
    inner = "" if brackets == "[]" else "1"
    assert parse_json(left * MAX_NESTING + inner + right * MAX_NESTING, "f.json is not JSON")
    for depth in (MAX_NESTING + 1, 900, 100_000):
        with pytest.raises(FileFormatError, match=r"f\.json is not JSON: "):
            parse_json(left * depth + inner + right * depth, "f.json is not JSON")


@pytest.mark.parametrize(
    "text", ["", "{", "9" * 5000, '{"a": ' + "1" * 5000 + "}", "nul", '"\\ud800"', '["\\uDFff x"]']
)
def test_what_is_no_json_of_whole_characters(text: str) -> None:
    with pytest.raises(FileFormatError, match=r"f\.json is not JSON"):
        parse_json(text, "f.json is not JSON")


def test_two_halves_make_a_character() -> None:
    assert parse_json('"\\ud83d\\ude00"', "f.json") == "\U0001f600"


class PanicException(BaseException):
    """Named as what libraries written in Rust raise where they give up."""


def test_a_library_that_gives_up_is_a_damaged_file_and_an_interrupt_is_none() -> None:
    with (
        pytest.raises(FileFormatError, match="f.bin cannot be used: index out of range"),
        library_errors("f.bin cannot be used"),
    ):
        raise PanicException("index out of range")
    with pytest.raises(KeyboardInterrupt), library_errors("f.bin cannot be used"):
        raise KeyboardInterrupt
