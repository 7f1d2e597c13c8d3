"""The admin API: customers are listed, put, deleted and rolled back by who has a key with the admin right.

An application of its own, for a port of its own. What a client sends is a coefficients file, numbers alone, and names;
nothing of it is ever opened as a path or an address.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from qrlora_deploy.errors import InputError, MalformedInputError, QrloraError
from qrlora_deploy.formats.customer_files import check_customer_id
from qrlora_deploy.serving.access import Keys, key_of, open_access
from qrlora_deploy.serving.audit import AuditLog
from qrlora_deploy.serving.customer_folder import Changed, CustomerFolder, StoredVersion
from qrlora_deploy.serving.http.front import not_found
from qrlora_deploy.serving.http.guard import Guard
from qrlora_deploy.serving.http.limits import HttpLimits
from qrlora_deploy.serving.http.protocol import parse_object
from qrlora_deploy.serving.http.replies import json_reply, reply_to_error
from qrlora_deploy.serving.json_log import log_request
from qrlora_deploy.serving.life import Life
from qrlora_deploy.serving.served import UnknownModelError

MAX_LISTED = 10_000
"""Ids in one answer; the next ones are asked for by `after`."""

MAX_FACT = 128
"""Characters of a name in the audit log."""


Work = Callable[[], dict[str, Any]]
"""What is done in a thread, and gives the body of the reply."""

Handler = Callable[[Request], Awaitable[Work]]


@dataclass(frozen=True)
class Admin:
    """What the admin API changes.

    Attributes:
        folders: of customers, by the model's name.
        keys: who may ask.
        audit: is told of each attempt to change something.
        reload: reads what is not followed, such as packed files; called in a thread.
    """

    folders: Mapping[str, CustomerFolder]
    keys: Keys
    audit: AuditLog
    reload: Callable[[], None] = lambda: None

    def routes(self) -> list[Route]:
        """All of them; each needs the admin right."""
        customers = "/v1/models/{model}/customers"
        one = f"{customers}/{{customer}}"
        return [
            self._route("/v1/models", "GET", self.models),
            self._route(customers, "GET", self.customers),
            self._route(one, "PUT", self.put, "put"),
            self._route(one, "DELETE", self.delete, "delete"),
            self._route(f"{one}/versions", "GET", self.versions),
            self._route(f"{one}/rollback", "POST", self.roll_back, "rollback"),
            self._route("/v1/reload", "POST", self.reload_all, "reload"),
        ]

    def _route(self, path: str, method: str, handler: Handler, action: str = "") -> Route:
        """A route with what all have in common: the key, errors as replies, the log, and the audit of a change."""

        async def endpoint(request: Request) -> Response:
            start, access = time.perf_counter(), open_access
            try:
                access = self.keys.access(key_of(request.headers.get("authorization")))
                access.check_admin()
                change = await _begun(handler, request)
                told = _Told(access.key_id, action, request) if action else None
                reply = json_reply(await asyncio.to_thread(self._done, change, told))
            except Exception as error:
                reply = reply_to_error(error, request.state.request_id)
            seconds = time.perf_counter() - start
            log_request(request.state.request_id, method, path, reply.status_code, seconds, key_id=access.key_id)
            return reply

        return Route(path, endpoint, methods=[method])

    def _done(self, change: Work, told: "_Told | None") -> Any:
        """Do it, and tell a change whatever comes of it. In a thread, which goes on where the client has gone."""
        if told is None:
            return change()
        self.audit.check()
        try:
            record = change()
        except Exception as error:
            # A foreign exception may hold anything.
            outcome = str(error) if isinstance(error, QrloraError) else "failed"
            self.audit.add(told.key_id, told.action, outcome, told.request_id, **told.facts)
            raise
        found = {name: record[name] for name in ("digest", "version") if name in record}
        action = record.get("action", told.action)
        self.audit.add(told.key_id, action, "done", told.request_id, **told.facts, **found)
        return record

    def _folder(self, request: Request) -> CustomerFolder:
        name = request.path_params["model"]
        if name not in self.folders:
            raise UnknownModelError(
                f"no model {name!r:.80} has a folder of customers; GET /v1/models lists those that have"
            )
        return self.folders[name]

    async def models(self, request: Request) -> Work:
        """Those whose customers can be changed."""
        return lambda: {"models": sorted(self.folders)}

    async def customers(self, request: Request) -> Work:
        """Ids in order, some at a time."""
        folder = self._folder(request)
        after, text = request.query_params.get("after", ""), request.query_params.get("limit", "1000")
        if not (text.isascii() and text.isdecimal() and len(text) < 6 and 1 <= int(text) <= MAX_LISTED):
            raise MalformedInputError(f"limit must be a number from 1 to {MAX_LISTED}")
        return lambda: _page(folder.customers(after, int(text)), int(text))

    async def put(self, request: Request) -> Work:
        """A coefficients file as the body becomes the customer."""
        folder, customer = self._folder(request), _customer(request)
        content = await request.body()
        return lambda: _changed(customer, folder.put(customer, content))

    async def delete(self, request: Request) -> Work:
        """The customer goes; with `?erase=true` its versions, too."""
        folder, customer = self._folder(request), _customer(request)
        erase = request.query_params.get("erase", "false")
        if erase not in ("true", "false"):
            raise MalformedInputError("erase must be true or false")
        return lambda: _removed(folder, customer, erase == "true")

    async def versions(self, request: Request) -> Work:
        """What is kept of a customer, the newest first."""
        folder, customer = self._folder(request), _customer(request)
        return lambda: {"customer": customer, "versions": list(map(_version, folder.versions(customer)))}

    async def roll_back(self, request: Request) -> Work:
        """An older version becomes the customer: the one that the body names, or the one before."""
        folder, customer = self._folder(request), _customer(request)
        body = await request.body()
        version = (parse_object(body) if body else {}).get("version")
        if not isinstance(version, str | None):
            raise MalformedInputError("version must be a text")
        return lambda: _changed(customer, folder.roll_back(customer, version))

    async def reload_all(self, request: Request) -> Work:
        """Keys and what is not followed are read again."""

        def reload() -> dict[str, Any]:
            self.keys.reload()
            self.reload()
            if self.keys.refused is not None:
                raise InputError(f"{self.keys.refused}; the keys that were read before go on")
            return {"reloaded": True}

        return reload


class _Told:
    """What the audit log is told of a request."""

    def __init__(self, key_id: str, action: str, request: Request) -> None:
        self.key_id, self.action, self.request_id = key_id, action, request.state.request_id
        self.facts = {name: str(value)[:MAX_FACT] for name, value in request.path_params.items()}


async def _begun(handler: Handler, request: Request) -> Work:
    """What a request asks to do; of one that is wrong, raising that: the audit log is told of it, too."""
    try:
        return await handler(request)
    except QrloraError as error:
        refusal = error

    def refuse() -> dict[str, Any]:
        raise refusal

    return refuse


def _customer(request: Request) -> str:
    name: str = request.path_params["customer"]
    check_customer_id(name)
    return name


def _page(found: list[str], limit: int) -> dict[str, Any]:
    return {"customers": found, "next": found[-1] if len(found) == limit else None}


def _version(it: StoredVersion) -> dict[str, Any]:
    return {"version": it.name, "size_bytes": it.size_bytes, "current": it.is_current}


def _removed(folder: CustomerFolder, customer: str, erase: bool) -> dict[str, Any]:
    if erase:
        folder.erase(customer)
    else:
        folder.delete(customer)
    return {"customer": customer, "action": "erase" if erase else "delete"}


def _changed(customer: str, changed: Changed) -> dict[str, str]:
    return {"customer": customer, "digest": changed.digest, "version": changed.version}


def make_admin_app(admin: Admin, life: Life | None = None) -> ASGIApp:
    """The application of an admin API, for any ASGI server.

    Args:
        admin: what it changes.
        life: of the server; once it drains, no connection is kept.
    """
    app = Starlette(routes=admin.routes(), exception_handlers={HTTPException: not_found})
    app.router.redirect_slashes = False
    longest = max((folder.max_file_bytes for folder in admin.folders.values()), default=2**16)
    # One byte more, so that it is the folder that says how long a file may be.
    return Guard(app, life or Life(), HttpLimits(max_body_bytes=longest + 1, max_bodies_bytes=4 * longest))
