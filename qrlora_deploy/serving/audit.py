"""Who changed which customer when: lines of JSON that are added to and never rewritten."""

import os
import time
from pathlib import Path

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.serving.json_log import json_line, time_text


class AuditLog:
    """A file with a line for each attempt to change something.

    It is opened anew for each line, so it may be moved away at any time. A line is on the disk when `add` returns.

    Args:
        path: the file; it is made where it is missing, for its owner alone.

    Raises:
        QrloraError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.check()

    def check(self) -> None:
        """Make sure that a line can be added: nothing is changed that could not be told.

        Raises:
            QrloraError: it cannot.
        """
        self._write(b"")

    def add(self, key_id: str, action: str, outcome: str, request_id: str = "", **facts: str) -> None:
        """Add a line.

        Args:
            key_id: of the key that asked.
            action: what was asked, such as "put".
            outcome: "done", or what was wrong.
            request_id: of the request.
            facts: beside it: model, customer, digest, version.

        Raises:
            QrloraError: it cannot be written.
        """
        line = {"time": time_text(time.time()), "key_id": key_id, "action": action, **facts, "outcome": outcome}
        self._write((json_line(line | ({"request_id": request_id} if request_id else {})) + "\n").encode())

    def _write(self, line: bytes) -> None:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                if line:
                    os.write(descriptor, line)
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise QrloraError(f"the audit log {self.path} cannot be written: {error.strerror or error}") from error
