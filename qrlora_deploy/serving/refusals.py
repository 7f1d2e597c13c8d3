"""Why a server answers a request by no answer, and the status that each reason has over HTTP and gRPC."""

from dataclasses import dataclass

from qrlora_deploy.errors import QrloraError


class RefusalError(QrloraError):
    """A request that was understood is not answered.

    Attributes:
        retry_after_s: when it is worth another try; None where another try ends alike.
    """

    kind = "refused"
    retry_after_s: float | None = None


class OverloadedError(RefusalError):
    """The queue is full, or this customer's share of it."""

    kind = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaError(OverloadedError):
    """The customer has used up its rows of this second."""

    kind = "quota"


class DrainingError(RefusalError):
    """The server ends, or does not answer yet."""

    kind = "not_ready"
    retry_after_s = 1.0


class LostError(RefusalError):
    """What was to answer has ended before it did; whether it had begun is not known."""

    kind = "lost"
    retry_after_s = 1.0


class DeadlineError(RefusalError):
    """The time that the client gave has passed; what still waited was not run."""

    kind = "deadline"


class TooLargeError(RefusalError):
    """A body, or a number of rows, is over its bound."""

    kind = "too_large"


class SlowClientError(RefusalError):
    """A client takes too long to send its request, or has gone."""

    kind = "slow"


class UnauthenticatedError(RefusalError):
    """No key, or one that is not known or has expired."""

    kind = "unauthenticated"


class ForbiddenError(RefusalError):
    """The key is known and does not allow this."""

    kind = "forbidden"


@dataclass(frozen=True)
class Status:
    """How a kind of error looks from outside.

    Attributes:
        http: status code.
        grpc: name of a member of `grpc.StatusCode`.
    """

    http: int
    grpc: str


FAILED = Status(500, "INTERNAL")

STATUS: dict[str, Status] = {
    "malformed_input": Status(400, "INVALID_ARGUMENT"),
    "invalid": Status(422, "INVALID_ARGUMENT"),
    "bad_file": Status(422, "INVALID_ARGUMENT"),
    "mismatch": Status(422, "FAILED_PRECONDITION"),
    "unauthenticated": Status(401, "UNAUTHENTICATED"),
    "forbidden": Status(403, "PERMISSION_DENIED"),
    "unknown_customer": Status(404, "NOT_FOUND"),
    "not_found": Status(404, "NOT_FOUND"),
    "too_large": Status(413, "INVALID_ARGUMENT"),
    "slow": Status(408, "DEADLINE_EXCEEDED"),
    "overloaded": Status(429, "RESOURCE_EXHAUSTED"),
    "quota": Status(429, "RESOURCE_EXHAUSTED"),
    "not_ready": Status(503, "UNAVAILABLE"),
    "lost": Status(503, "UNAVAILABLE"),
    "deadline": Status(504, "DEADLINE_EXCEEDED"),
}
"""By `QrloraError.kind`; the place of what the server says of each."""


def status_of(error: BaseException) -> Status:
    """The status of an error; what is none of ours is a failure of the server."""
    return STATUS.get(error.kind, FAILED) if isinstance(error, QrloraError) else FAILED


AGAIN_S = 1.0
"""When it is worth another try where nobody knows better."""


def retry_after_of(error: QrloraError) -> float | None:
    """When it is worth another try; None where another try ends alike."""
    known: float | None = getattr(error, "retry_after_s", None)
    # Also of what the runtime says, which knows nothing of servers: a store that is down, a table that is full.
    return AGAIN_S if known is None and error.kind == DrainingError.kind else known


GONE = "gone"
"""The reason of a request whose client did not wait; no error has it for its kind."""


def reason_of(error: BaseException) -> str:
    """Why a request was not answered, in one word: the error's kind."""
    return error.kind if isinstance(error, QrloraError) else QrloraError.kind
