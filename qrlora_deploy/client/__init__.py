"""A client of the server: texts or tensors to it, answers from it. It needs httpx and numpy, and no bundle."""

from qrlora_deploy.errors import MissingPartError

try:
    import httpx  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingPartError(
        "qrlora_deploy.client needs httpx, which is not installed; pip install 'qrlora-deploy[client]'", name="httpx"
    ) from error

from qrlora_deploy.client.answers import Answer, Inference
from qrlora_deploy.client.asynchronous import AsyncClient
from qrlora_deploy.client.errors import (
    BadAnswerError,
    BadRequestError,
    DeadlineError,
    ForbiddenError,
    NotFoundError,
    OverloadedError,
    ServerError,
    TooLargeError,
    UnauthenticatedError,
    UnavailableError,
    UnreachableError,
)
from qrlora_deploy.client.retrying import Retries
from qrlora_deploy.client.synchronous import Client

__all__ = [
    "Answer",
    "AsyncClient",
    "BadAnswerError",
    "BadRequestError",
    "Client",
    "ForbiddenError",
    "Inference",
    "NotFoundError",
    "OverloadedError",
    "Retries",
    "ServerError",
    "DeadlineError",
    "TooLargeError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnreachableError",
]
