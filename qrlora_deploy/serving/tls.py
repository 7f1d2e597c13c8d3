"""What a server shows of who it is, and asks of who its clients are."""

from dataclasses import dataclass
from pathlib import Path


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
