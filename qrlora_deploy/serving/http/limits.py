"""What one client may take of the HTTP front."""

from dataclasses import dataclass

from qrlora_deploy.errors import InputError

MIB = 2**20


@dataclass(frozen=True)
class HttpLimits:
    """Bounds, each of which a single connection or all of them together run into before the server falls over.

    Attributes:
        max_body_bytes: of a body, and of what a compressed one becomes.
        max_bodies_bytes: of all bodies that are held at a time.
        max_head_bytes: of the request line and the headers.
        max_connections: at a time.
        head_s: from the begin of a connection or a request to the end of its headers.
        body_s: from there to the end of the body.
        reply_s: for a client to take its reply.
        keep_alive_s: that a connection may be idle.
        end_s: once the server ends, for the rest of a request whose head or body is under way, and for a client that
            takes nothing more of its reply.

    Raises:
        InputError: one is not positive.
    """

    max_body_bytes: int = 64 * MIB
    max_bodies_bytes: int = 1024 * MIB
    max_head_bytes: int = 32 * 1024
    max_connections: int = 4096
    head_s: float = 10.0
    body_s: float = 60.0
    reply_s: float = 60.0
    keep_alive_s: float = 75.0
    end_s: float = 5.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise InputError(f"{name} must be more than 0, not {value}")
