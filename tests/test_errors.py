"""Messages are one line of bounded length, and exceptions of other libraries become ours at one boundary."""

import pytest

from qrlora_deploy.errors import FileFormatError, InputError, QrloraError, library_errors


@pytest.mark.parametrize("name", ["x" * 50_000, "a\nb\r\n" * 20_000, "\x1b[31m" * 9_000, "\u202e" * 9_000, ""])
def test_a_message_is_one_short_line_whatever_the_names_in_it(name: str) -> None:
    message = str(InputError(f"data.tsv: unknown label {name}; the head knows billing, refund"))
    assert message.startswith("data.tsv: unknown label")
    assert message.endswith("the head knows billing, refund")
    assert len(message) < 500
    assert message.isprintable()


def test_a_message_that_fits_stays_as_it_is() -> None:
    message = "data.tsv: row 3 has no label; every example needs one"
    assert str(InputError(message)) == message


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (KeyError("weight_map"), "'weight_map'"),
        (RecursionError("maximum recursion depth exceeded"), "maximum recursion depth exceeded"),
        (EOFError(), "EOFError"),
        (PermissionError(13, "Permission denied", "f.json"), "Permission denied"),
        (ImportError("bitsandbytes is missing\nand more"), "bitsandbytes is missing"),
    ],
)
def test_whatever_a_library_raises_names_the_file(raised: Exception, reason: str) -> None:
    with pytest.raises(FileFormatError) as caught, library_errors("f.json cannot be used"):
        raise raised
    assert str(caught.value) == f"f.json cannot be used: {reason}"
    assert caught.value.__cause__ is raised


def test_our_own_errors_and_a_lack_of_memory_pass_through() -> None:
    with pytest.raises(QrloraError, match="^as it is$"), library_errors("f.json"):
        raise QrloraError("as it is")
    with pytest.raises(MemoryError), library_errors("f.json"):
        raise MemoryError
