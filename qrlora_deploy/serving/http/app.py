"""The whole HTTP application."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from qrlora_deploy.serving.http.front import Front, not_found


def make_app(front: Front) -> ASGIApp:
    """The application of a front, for any ASGI server."""
    app = Starlette(routes=front.routes(), exception_handlers={HTTPException: not_found})
    app.router.redirect_slashes = False
    return app
