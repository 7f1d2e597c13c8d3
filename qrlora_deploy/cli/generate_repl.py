"""The conversation of `generate`: a line a prompt, each for a customer."""

import io
import sys
from dataclasses import replace
from typing import IO, TYPE_CHECKING

import click

from qrlora_deploy.cli.generated import as_chat, show_stream
from qrlora_deploy.cli.repl import LISTED, read_line
from qrlora_deploy.errors import InputError, QrloraError, one_line

if TYPE_CHECKING:
    from qrlora_deploy.runtime.generation.requests import GenerationRequest
    from qrlora_deploy.runtime.generation.session import GenerationSession

HELP = (
    "Type a prompt; @NAME PROMPT is for a customer, @NAME alone stays with it, /base, /customers, /new, /help, /quit."
)


class Conversation:
    """Answers the lines of stdin.

    Args:
        session: writes the answers.
        defaults: of every request; its customer is the one to begin with.
        chat: lines are messages of a chat, which each customer has with itself; /new begins it anew.
        system: the first message of a chat.
    """

    def __init__(
        self, session: "GenerationSession", defaults: "GenerationRequest", chat: bool, system: str | None
    ) -> None:
        self._session, self._defaults, self._chat, self._system = session, defaults, chat, system
        self._customer = defaults.customer
        self._chats: dict[str | None, list[dict[str, str]]] = {}

    def converse(self, stdout: IO[str]) -> None:
        """Answer lines until stdin ends; an error is shown and the conversation goes on. New files go live meanwhile.

        Raises:
            InputError: there is no such customer to begin with.
        """
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        self._session.check_customer(self._customer)
        with self._session:
            click.echo(HELP, err=True)
            while True:
                click.echo(f"{self._customer or 'base'}> ", nl=False, err=True)
                line = read_line(sys.stdin)
                if not line or line.strip() in ("/quit", "/exit"):
                    return
                try:
                    self._obey(line.strip(), stdout)
                except QrloraError as error:
                    click.echo(f"Error: {one_line(str(error))}", err=True)

    def _obey(self, line: str, stdout: IO[str]) -> None:
        customer = self._customer
        if line.startswith("@"):
            customer, _, line = line[1:].partition(" ")
            self._session.check_customer(customer)
            if not line.strip():
                self._customer = customer
                return
        if line.startswith("/"):
            self._command(line)
        elif line.strip():
            self._answer(customer, line.strip(), stdout)

    def _command(self, line: str) -> None:
        if line == "/base":
            self._customer = None
        elif line == "/customers":
            click.echo(self._customers(), err=True)
        elif line == "/new":
            self._chats.clear()
        elif line == "/help":
            click.echo(HELP, err=True)
        else:
            raise InputError(f"there is no {line.split()[0]}. {HELP}")

    def _answer(self, customer: str | None, text: str, stdout: IO[str]) -> None:
        if not self._chat:
            show_stream(self._session, replace(self._defaults, prompt=text, customer=customer), stdout)
            return
        before = self._chats.get(customer)
        chat = as_chat(text, self._system) if before is None else [*before, {"role": "user", "content": text}]
        answer = show_stream(self._session, replace(self._defaults, prompt=chat, customer=customer), stdout)
        # A message that was refused is no part of the chat.
        self._chats[customer] = [*chat, {"role": "assistant", "content": answer.text}]

    def _customers(self) -> str:
        store = self._session.store
        if store is None:
            return "there are no customers without --customers"
        names = store.customers()
        more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
        return ", ".join([*names[:LISTED], *more]) or f"{store.folder} holds no customers"
