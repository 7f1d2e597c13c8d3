"""A look at a file of rows before a library parses it: is it UTF-8, and are header and rows of a bearable length?"""

import codecs
import csv
import io
from collections.abc import Iterator
from pathlib import Path

from qrlora_deploy.errors import InputError

CHUNK_BYTES = 2**20


def chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, piece by piece."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def check_rows(path: Path, most_bytes: int) -> bool:
    """Whether a file is UTF-8 throughout.

    Args:
        path: a file of lines.
        most_bytes: that a line may have. Counted here, since a parser takes its time and memory first.

    Raises:
        InputError: a line is longer.
    """
    decoder, is_text, run, number = codecs.getincrementaldecoder("utf-8")(), True, 0, 1
    for chunk in chunks(path):
        first = chunk.find(b"\n")
        if run + (len(chunk) if first < 0 else first) > most_bytes:
            raise InputError(f"{path}: line {number}: a row is longer than {most_bytes // 2**20} MB; shorten it")
        run = run + len(chunk) if first < 0 else len(chunk) - chunk.rfind(b"\n") - 1
        number += chunk.count(b"\n")
        is_text = is_text and _decodes(decoder, chunk, final=False)
    return is_text and _decodes(decoder, b"", final=True)


def count_columns(path: Path, delimiter: str) -> int:
    """How many columns the first line that is not empty has, at most: a delimiter in quotation marks counts too."""
    with path.open("rb") as file:
        for line in file:
            if line.strip(b"\r\n"):
                return line.count(delimiter.encode()) + 1
    return 0


def header_of(source: Path | bytes, delimiter: str) -> list[str]:
    """The names in the first line that is not empty, of a file or its content in UTF-8.

    Raises:
        csv.Error: the line is no header.
    """
    raw = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    with io.TextIOWrapper(raw, "utf-8-sig", newline="") as text:
        plain = csv.reader(text, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        rows = plain if delimiter == "\t" else csv.reader(text, delimiter=delimiter)
        return next((row for row in rows if row), [])


def marked_text(path: Path) -> tuple[str, str]:
    """The text of a file that is not UTF-8 throughout, and a mark that stands before two hexadecimal digits for each
    byte that is no text. The mark is a character that the file does not hold."""
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    mark = next(char for char in map(chr, range(0xFDD0, 0x10FFFF)) if char not in text)
    return _each_byte(text, mark), mark


def without_marks(cell: str, mark: str) -> str:
    """A cell of a marked text as it can be shown: `caf\\xe9`."""
    return cell.replace(mark, "\\x")


def _each_byte(text: str, mark: str) -> str:
    # Surrogates of this error handler: the byte is the lower half of the code.
    return "".join(f"{mark}{ord(char) & 0xFF:02x}" if "\udc80" <= char <= "\udcff" else char for char in text)


def _decodes(decoder: codecs.IncrementalDecoder, chunk: bytes, final: bool) -> bool:
    try:
        decoder.decode(chunk, final)
    except UnicodeDecodeError:
        return False
    return True
