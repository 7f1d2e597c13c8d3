"""What a command prints: text or JSON on stdout; progress on stderr."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from qrlora_deploy.errors import QrloraError, one_line, shortened

if TYPE_CHECKING:
    from qrlora_deploy.runtime.prediction.predictor import Prediction

Progress = Callable[[str, int, int], None]

LINE_SECONDS = 10.0
"""Between two lines of progress where stderr is no terminal."""

PIPE_WIDTH = 200
"""Columns when stdout is no terminal: wide enough that no cell of a table is cut."""

LIST_ITEMS = 8
"""Of a long list, such as 150 labels; `--json` has them all."""


CELL = 2000
"""Characters of a value that are shown: a name in a file may have any number; `--json` has them all."""


@dataclass(frozen=True)
class Table:
    """Rows under `columns`; numbers are set to the right and formatted by `cell`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""


@dataclass(frozen=True)
class Output:
    """The result of a command.

    Attributes:
        record: everything, for `--json`.
        headline: one line that says what was done.
        facts: name and value, one a line.
        tables: after the facts.
        failure: raised after printing; a check that ran and failed.
        live: runs instead of the printing and writes to stdout as it goes.
    """

    record: Any
    headline: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    failure: QrloraError | None = None
    live: Callable[[IO[str]], None] | None = None


def show(output: Output, as_json: bool, stream: IO[str]) -> None:
    """Print `output` to `stream`."""
    if output.live is not None:
        output.live(stream)
        return
    if as_json:
        escape = (getattr(stream, "encoding", None) or "utf-8").lower() not in ("utf-8", "utf8")
        stream.write(json.dumps(plain(output.record), indent=2, ensure_ascii=escape) + "\n")
        return
    # Imported here: rich takes a tenth of the time that --help may take.
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False, markup=False)
    if output.headline:
        console.print(Text(one_line(output.headline), style="bold"))
    if output.facts:
        grid = RichTable.grid(padding=(0, 2))
        for name, value in output.facts.items():
            grid.add_row(Text(f"  {name}", style="dim"), Text(cell(value)))
        console.print(grid)
    for table in output.tables:
        drawn = RichTable(title=Text(table.title) if table.title else None, title_justify="left")
        for index, column in enumerate(table.columns):
            number = any(isinstance(row[index], int | float) for row in table.rows)
            drawn.add_column(Text(column), justify="right" if number else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*(Text(cell(value)) for value in row))
        console.print(drawn)


def cell(value: Any) -> str:
    """A value as one line of text; four significant digits are enough to read."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return shortened(", ".join(f"{key} {cell(item)}" for key, item in value.items()), CELL) or "-"
    if isinstance(value, list | tuple):
        shown = value if len(value) <= LIST_ITEMS else [*value[:LIST_ITEMS], f"and {len(value) - LIST_ITEMS} more"]
        return shortened(", ".join(cell(item) for item in shown), CELL) or "-"
    return shortened(str(value), CELL)


def plain(value: Any) -> Any:
    """`value` as JSON knows it: dataclasses and models become objects, NaN and Inf become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"))
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def show_remark(record: Mapping[str, Any]) -> None:
    """Say on stderr what a user may not expect of a run, where its record has such a `remark`."""
    if remark := record.get("remark"):
        print(f"Note: {one_line(str(remark))}", file=sys.stderr)


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """A bar on stderr for the library's (description, done, total); where it is no terminal, a line now and then."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(description: str, done: int, total: int) -> None:
            if description not in tasks:
                tasks[description] = bar.add_task(one_line(description), total=total)
            bar.update(tasks[description], completed=done, total=total)

        yield advance


def _lines() -> Progress:
    lines, before = TimedLines(), ""

    def show_line(description: str, done: int, total: int) -> None:
        nonlocal before
        # The line before would stand for all the time that a long step takes.
        lines.show(f"{one_line(description)}: {done} of {total}", begins=description != before)
        before = description

    return show_line


class TimedLines:
    """Lines of progress on stderr, one every `LINE_SECONDS` and one for each step.

    Attributes:
        start: when it was made, of `time.monotonic`.
    """

    def __init__(self) -> None:
        self.start = self._shown = time.monotonic()

    def show(self, line: str, last: bool = False, begins: bool = False) -> None:
        """Show a line if it is time for one; the last one at any rate, and one that begins another step of a command
        that has taken long already."""
        now = time.monotonic()
        if last or now - self._shown >= LINE_SECONDS or (begins and now - self.start >= LINE_SECONDS):
            self._shown = now
            click.echo(line, err=True)


def in_words(answer: "Prediction", of_words: bool) -> str:
    """An answer for a person: the labels that apply, or what was found in the text."""
    shown = [f"{span.text} ({span.label})" for span in answer.spans] if of_words else answer.labels
    return ", ".join(shown) or "none"


def size_text(size_bytes: int) -> str:
    """A size for people: `2.5 kB`."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
