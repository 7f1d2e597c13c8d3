"""The conversation of `predict --repl`."""

import sys
from contextlib import nullcontext
from typing import IO, TYPE_CHECKING

import click

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.text import one_line

if TYPE_CHECKING:
    from qrlora_deploy.runtime.predictor import Predictor
    from qrlora_deploy.runtime.store import CustomerStore

HELP = "Type a text. /customer NAME switches, /base goes back to the base, /customers lists, /quit ends."


def converse(predictor: "Predictor", store: "CustomerStore | None", customer: str | None, stdout: IO[str]) -> None:
    """Answer the lines of stdin until it ends; an error is shown and the conversation goes on.

    While it lasts, new files in the folder of `store` go live.
    """
    with store or nullcontext():
        click.echo(HELP, err=True)
        while True:
            click.echo(f"{customer or 'base'}> ", nl=False, err=True)
            line = sys.stdin.readline()
            if not line or line.strip() in ("/quit", "/exit"):
                return
            try:
                customer = _obey(predictor, customer, line.strip(), stdout)
            except QrloraError as error:
                click.echo(f"Error: {one_line(str(error))}", err=True)


def _obey(predictor: "Predictor", customer: str | None, line: str, stdout: IO[str]) -> str | None:
    """Do what one line says; returns who the customer is from now on."""
    word, _, rest = line.partition(" ")
    if word == "/customer" and rest.strip():
        # An answer that nobody reads: it makes sure that the customer is there.
        predictor.predict(["-"], customers=[rest.strip()])
        return rest.strip()
    if word == "/base":
        return None
    if word == "/customers":
        names = predictor.switchable.customers() if predictor.switchable is not None else []
        click.echo(", ".join(names) or "none is loaded", err=True)
    elif word.startswith("/"):
        click.echo(HELP, err=True)
    elif line:
        answer = predictor.predict([line], customers=[customer])[0]
        stdout.write(f"{one_line(answer.label)}\t{answer.score:.4f}\n")
        stdout.flush()
    return customer
