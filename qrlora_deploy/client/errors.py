"""What a server answers instead of an answer, as exceptions."""

from typing import ClassVar

from qrlora_deploy.errors import QrloraError


class ServerError(QrloraError):
    """The server did not answer, and why.

    Attributes:
        status: code of the HTTP answer; 0 where there was none.
        request_id: by which the server's log knows the request; empty where it told none.
        retry_after_s: when the server asks to come again; None: it does not say.
        again: whether another try may end otherwise.
    """

    status = 0
    again: ClassVar[bool] = False

    def __init__(self, message: str, status: int = 0, request_id: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status or self.status
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class BadRequestError(ServerError):
    """The request is wrong, or a customer's file cannot be used: 400, 422 and other codes of that kind."""

    kind = "malformed_input"


class UnauthenticatedError(ServerError):
    """No key, or one that is not known or has expired: 401."""

    kind = "unauthenticated"


class ForbiddenError(ServerError):
    """The key has not the right: 403."""

    kind = "forbidden"


class NotFoundError(ServerError):
    """There is no such model or customer, or the key may not ask for it: 404."""

    kind = "not_found"


class TooLargeError(ServerError):
    """The request is over a bound: 413."""

    kind = "too_large"


class OverloadedError(ServerError):
    """The server has too much to do, or the customer has used up its rows: 429."""

    kind = "overloaded"
    again = True


class UnavailableError(ServerError):
    """The server begins or ends: 503, and 502 of what stands before it."""

    kind = "not_ready"
    again = True


class DeadlineError(ServerError):
    """The time that was given has passed, here or at the server: 504."""

    kind = "deadline"


class UnreachableError(ServerError):
    """There was no whole answer: nobody listens, or the connection broke."""

    kind = "not_ready"
    again = True


class BadAnswerError(ServerError):
    """What came is no answer of such a server."""


BY_STATUS: dict[int, type[ServerError]] = {
    401: UnauthenticatedError,
    403: ForbiddenError,
    404: NotFoundError,
    413: TooLargeError,
    429: OverloadedError,
    502: UnavailableError,
    503: UnavailableError,
    504: DeadlineError,
}


def error_class(status: int) -> type[ServerError]:
    """The exception for a status that is no success."""
    return BY_STATUS.get(status, BadRequestError if 400 <= status < 500 else ServerError)
