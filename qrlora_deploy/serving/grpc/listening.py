"""Where a gRPC server listens, how much it takes, and its certificates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from qrlora_deploy.errors import InputError, library_errors
from qrlora_deploy.serving.addresses import at_port, bound_socket
from qrlora_deploy.serving.tls import Tls

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

    def options(self, is_shared: bool = False) -> Sequence[tuple[str, Any]]:
        """As gRPC's core takes them; whether other processes of this server listen on the port, too."""
        return (
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
            # Two servers on one port would share its clients without a word.
            ("grpc.so_reuseport", int(is_shared)),
            # A client that is gone without a word is noticed, and its requests are dropped.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        )


class Certificates:
    """Files of certificates, as gRPC takes them. Safe for many threads.

    Raises:
        InputError: a file cannot be used.
    """

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self.read()
        self._given = self._current

    def read(self) -> None:
        """Read the files, for whoever connects from now on.

        Raises:
            InputError: one of them cannot be used; those that were read before stay.
        """
        tls = self._tls
        # gRPC itself would say nothing, and refuse every client.
        tls.check()
        with library_errors(f"TLS cannot be offered with {tls.cert} and {tls.key}", InputError):
            pair = (tls.key.read_bytes(), tls.cert.read_bytes())
        self._current = grpc.ssl_server_certificate_configuration([pair], self._client_ca())

    def _client_ca(self) -> bytes | None:
        path = self._tls.client_ca
        if path is None:
            return None
        with library_errors(f"{path} cannot be read", InputError):
            return path.read_bytes()

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC asks for at every new connection; None: what it has."""
        if self._given is self._current:
            return None
        self._given = self._current
        return self._given

    def credentials(self) -> grpc.ServerCredentials:
        """For a port."""
        needs_client = self._tls.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(self._current, self._changed, needs_client)


def listen(
    server: grpc.aio.Server, host: str, port: int, certificates: Certificates | None, is_shared: bool = False
) -> int:
    """Make a server listen; the port, which gRPC chooses where it is 0. Other processes of this server may share it.

    Raises:
        InputError: the address cannot be listened on.
    """
    if port:
        # gRPC names no reason, and writes to stderr.
        bound_socket(host, port, is_shared).close()
    address = at_port(host, port)
    try:
        if certificates is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, certificates.credentials())
    except RuntimeError:
        bound = 0
    if not bound:
        raise InputError(f"{address} cannot be listened on for gRPC; choose another port")
    return int(bound)
