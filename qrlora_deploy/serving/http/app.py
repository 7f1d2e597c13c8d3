"""The whole HTTP application."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from qrlora_deploy.serving.http.front import Front, not_found
from qrlora_deploy.serving.http.guard import Guard
from qrlora_deploy.serving.http.limits import HttpLimits


def make_app(front: Front, limits: HttpLimits | None = None) -> ASGIApp:
    """The application of a front, for any ASGI server."""
    app = Starlette(routes=front.routes(), exception_handlers={HTTPException: not_found})
    app.router.redirect_slashes = False
    return Guard(app, front.life, limits)
