"""An S3 server of moto in a process of its own, which may be killed and come back empty."""

import socket
import subprocess
import time

import fsspec

BUCKET = "bucket"
STARTED = """
import sys
from moto.server import ThreadedMotoServer
ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]), verbose=False).start()
sys.stdin.read()
"""


class S3Server:
    """A server with one bucket.

    Args:
        python: of an environment with moto[server].

    Attributes:
        url: of its HTTP API.
    """

    def __init__(self, python: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url, self._python = f"http://127.0.0.1:{self._port}", python
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """By which s3fs finds it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start it, empty."""
        command = [self._python, "-c", STARTED, str(self._port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port)).close()
                return
            except OSError:
                assert time.monotonic() < deadline and self._process.poll() is None
                time.sleep(0.05)

    def make_bucket(self) -> None:
        """Make the bucket."""
        options = {"key": "testing", "secret": "testing", "client_kwargs": {"endpoint_url": self.url}}
        fsspec.filesystem("s3", skip_instance_cache=True, **options).mkdir(BUCKET)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.communicate()
