"""Where a gRPC server listens, how much it takes, and its certificates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from qrlora_deploy.errors import InputError

MAX_METADATA_BYTES = 16 * 2**10


@dataclass(frozen=True)
class GrpcLimits:
    """How much a server takes at a time.

    Attributes:
        max_message_bytes: of a request; gRPC itself refuses a larger one by RESOURCE_EXHAUSTED.
        max_calls: that are answered at the same time, of all clients; more are refused by RESOURCE_EXHAUSTED.
    """

    max_message_bytes: int = 16 * 2**20
    max_calls: int = 1024

    def options(self) -> Sequence[tuple[str, Any]]:
        """As gRPC's core takes them."""
        return (
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
            # Two servers on one port would share its clients without a word.
            ("grpc.so_reuseport", 0),
            # A client that is gone without a word is noticed, and its requests are dropped.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        )


@dataclass(frozen=True)
class GrpcTls:
    """Files of certificates, in PEM.

    Attributes:
        certificate: of the server, with those above it.
        key: of the certificate.
        client_ca: whoever connects needs a certificate that one of these has signed; None: nobody needs one.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """What gRPC needs of them.

        Raises:
            InputError: a file cannot be read.
        """
        pair = (_read(self.key), _read(self.certificate))
        ca = None if self.client_ca is None else _read(self.client_ca)
        return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def listen(server: grpc.aio.Server, host: str, port: int, tls: GrpcTls | None) -> int:
    """Make a server listen; the port, which gRPC chooses where it is 0.

    Raises:
        InputError: the address cannot be listened on, or a file of certificates cannot be used.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    credentials = None if tls is None else tls.credentials()
    try:
        if credentials is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials)
    except RuntimeError:
        # gRPC's own words name no reason.
        bound = 0
    if not bound:
        files = "" if tls is None else f", or {tls.certificate} and {tls.key} are no pair in PEM"
        raise InputError(f"gRPC cannot listen on {address}: the port is taken or the host is not this machine's{files}")
    return int(bound)
