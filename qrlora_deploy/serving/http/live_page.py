"""The page that shows what the server does, for a person: its files, and the numbers that it asks for."""

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from importlib import resources
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from qrlora_deploy.serving import live
from qrlora_deploy.serving.access import Access
from qrlora_deploy.serving.http.replies import json_reply
from qrlora_deploy.serving.life import Life
from qrlora_deploy.serving.parts import LiveNumbers
from qrlora_deploy.version import __version__

FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/live.css": ("page.css", "text/css; charset=utf-8"),
    "/live.js": ("page.js", "text/javascript; charset=utf-8"),
    "/live.svg": ("icon.svg", "image/svg+xml"),
}
"""By path: files of the package, which hold nothing of this server."""

NUMBERS = "/live.json"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

Handler = Callable[[Request, Access], Awaitable[Response]]


class Shown(Protocol):
    """A model, as far as the page shows it; `served.ServedModel` is one."""

    @property
    def name(self) -> str:
        """In URLs."""

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""


class LivePage:
    """Answers for the page.

    Args:
        models: that are served; asked anew each time.
        life: whether requests are taken.
        window: the last minutes of all processes.
    """

    def __init__(self, models: Iterable[Shown], life: Life, window: LiveNumbers) -> None:
        self._models, self._life, self._window = models, life, window
        self._started_s = time.monotonic()
        folder = resources.files(live)
        self._files = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}

    def handlers(self) -> Iterator[tuple[str, Handler, bool]]:
        """Path, handler, and whether it needs no key: a browser has none to send until the page has asked for it."""
        for path in self._files:
            yield path, self._file, True
        yield NUMBERS, self._numbers, False

    async def _file(self, request: Request, access: Access) -> Response:
        body, kind = self._files[request.url.path]
        return Response(body, headers={"content-type": kind, **HEADERS})

    async def _numbers(self, request: Request, access: Access) -> Response:
        numbers = await self._window.ask()
        models = [
            {"name": model.name, "ready": self._life.ready and model.ready, **numbers["models"].get(model.name, {})}
            for model in self._models
        ]
        about = {"version": __version__, "state": self._life.state, "uptime_s": time.monotonic() - self._started_s}
        reply = json_reply(about | numbers | {"models": models})
        reply.headers["cache-control"] = "no-store"
        return reply
