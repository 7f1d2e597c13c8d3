"""The whole HTTP application."""

import re

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from qrlora_deploy.serving.http.front import Front, not_found
from qrlora_deploy.serving.http.guard import Guard
from qrlora_deploy.serving.http.limits import HttpLimits

INFER = re.compile(r"/v2/models/([^/]+)/infer")


class Shortcut:
    """Finds the two routes that carry the load, without Starlette's router and its handling of errors."""

    def __init__(self, front: Front, app: ASGIApp) -> None:
        self._app = app
        endpoints = {route.path: route.app for route in front.routes()}
        self._classify, self._infer = endpoints["/v1/classify"], endpoints["/v2/models/{model}/infer"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on."""
        app = self._app
        if scope["type"] == "http" and scope["method"] == "POST":
            if scope["path"] == "/v1/classify":
                app = self._classify
            elif found := INFER.fullmatch(scope["path"]):
                scope["path_params"] = {"model": found[1]}
                app = self._infer
        await app(scope, receive, send)


def make_app(front: Front, limits: HttpLimits | None = None) -> ASGIApp:
    """The application of a front, for any ASGI server."""
    app = Starlette(routes=front.routes(), exception_handlers={HTTPException: not_found})
    app.router.redirect_slashes = False
    return Guard(Shortcut(front, app), front.life, limits)
