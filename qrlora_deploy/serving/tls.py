"""What a server shows of who it is, and asks of who its clients are."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from qrlora_deploy.errors import InputError, library_errors


@dataclass(frozen=True)
class Tls:
    """Files of a server's identity.

    Attributes:
        cert: chain of certificates, PEM.
        key: of the first one, PEM.
        client_ca: who signs the clients' certificates, which are then asked for; None: clients need none.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def check(self) -> None:
        """Make sure that the files can be used.

        Raises:
            InputError: one of them cannot.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with library_errors(f"TLS cannot be offered with {self.cert} and {self.key}", InputError):
            context.load_cert_chain(self.cert, self.key)
        if self.client_ca is not None:
            with library_errors(f"{self.client_ca} holds no certificates of those who sign the clients'", InputError):
                context.load_verify_locations(self.client_ca)
