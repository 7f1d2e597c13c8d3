"""The conversation of `predict --repl`."""

import io
import sys
import threading
from contextlib import nullcontext
from typing import IO, TYPE_CHECKING

import click

from qrlora_deploy.cli.output import in_words
from qrlora_deploy.errors import InputError, QrloraError, one_line, shortened

if TYPE_CHECKING:
    from qrlora_deploy.runtime.customers.store import CustomerStore, StoreEvent
    from qrlora_deploy.runtime.prediction.predictor import Predictor

HELP = "Type a text. /customer NAME switches, /base goes back to the base, /customers lists, /help, /quit ends."

MAX_LINE = 16 * 2**20
"""Characters of a line that are kept."""

LISTED = 20
"""Customers that are named of a folder that may hold thousands."""


def converse(predictor: "Predictor", store: "CustomerStore | None", customer: str | None, stdout: IO[str]) -> None:
    """Answer the lines of stdin until it ends; an error is shown and the conversation goes on.

    While it lasts, new files in the folder of `store` go live.

    Raises:
        InputError: there is no such customer to begin with.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if customer is not None:
        _make_sure(predictor, customer)
    with store or nullcontext():
        click.echo(HELP, err=True)
        while True:
            click.echo(f"{customer or 'base'}> ", nl=False, err=True)
            line = read_line(sys.stdin)
            if not line or line.strip() in ("/quit", "/exit"):
                return
            try:
                customer = _obey(predictor, store, customer, line.strip(), stdout)
            except QrloraError as error:
                click.echo(f"Error: {one_line(str(error))}", err=True)


def read_line(stdin: IO[str]) -> str:
    """The next line; of one that is far longer than any model reads, the beginning. Empty at the end."""
    line = stdin.readline(MAX_LINE)
    if len(line) == MAX_LINE and not line.endswith("\n"):
        # What is left of the line is no text of its own.
        while (rest := stdin.readline(MAX_LINE)) and not rest.endswith("\n"):
            pass
        click.echo(f"only the first {MAX_LINE} characters of the line are read", err=True)
    return line


def report(event: "StoreEvent") -> None:
    """Show what happened to a customer's file while the conversation was about something else.

    What a line of the conversation brought about is answered there.
    """
    if threading.current_thread() is not threading.main_thread():
        click.echo(f"{event.kind}: {shortened(event.message)}", err=True)


def _obey(
    predictor: "Predictor", store: "CustomerStore | None", customer: str | None, line: str, stdout: IO[str]
) -> str | None:
    """Do what one line says; returns who the customer is from now on."""
    word, _, rest = line.partition(" ")
    if word == "/customer":
        if not rest.strip():
            raise InputError("/customer needs a name: /customer NAME")
        _make_sure(predictor, rest.strip())
        return rest.strip()
    if word == "/base":
        return None
    if word == "/customers":
        click.echo(_list(predictor, store), err=True)
    elif word == "/help":
        click.echo(HELP, err=True)
    elif word.startswith("/"):
        raise InputError(f"there is no {word}. {HELP}")
    elif line:
        stdout.write(f"{_answer(predictor, line, customer)}\n")
        stdout.flush()
    return customer


def _make_sure(predictor: "Predictor", customer: str) -> None:
    """Raise unless the customer is there: an answer that nobody reads."""
    _answer(predictor, "-\t-" if predictor.task.needs_pairs else "-", customer)


def _answer(predictor: "Predictor", line: str, customer: str | None) -> str:
    """The labels and the score, or the numbers of an embedding, with tabs between them."""
    if not predictor.task.has_labels:
        return "\t".join(f"{value:.6f}" for value in predictor.embed([line], customers=[customer])[0])
    answer = predictor.predict(*_question(predictor, line), customers=[customer])[0]
    return f"{one_line(in_words(answer, predictor.task.answers_words))}\t{answer.score:.4f}"


def _question(predictor: "Predictor", line: str) -> tuple[list[str], list[str] | None]:
    """The text of a line, or the two of a pair.

    Raises:
        InputError: a pair is needed, and the line has no tab.
    """
    if not predictor.task.needs_pairs:
        return [line], None
    first, tab, second = line.partition("\t")
    if not tab:
        raise InputError(f"a bundle for {predictor.task.name} scores pairs: type both texts with a tab between them")
    return [first.strip()], [second.strip()]


def _list(predictor: "Predictor", store: "CustomerStore | None") -> str:
    """The customers that have a file, those marked that are in the table already."""
    if predictor.switchable is None:
        return "a merged bundle holds one customer, who has no name in it"
    if store is None:
        return "there are no customers without --customers"
    loaded = set(predictor.switchable.customers())
    # A file that was deleted may be served for a moment yet.
    names = sorted(loaded | set(store.customers()))
    shown = [f"{name} (loaded)" if name in loaded else name for name in names[:LISTED]]
    more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return ", ".join([*shown, *more]) or f"{store.folder} holds no customers"
