"""Writing customers' files beside the training: a flush to the disk takes as long as a step on a GPU."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from qrlora_deploy.coefficients import Coefficients, write_coefficients
from qrlora_deploy.training.fleet.summary import Line, trained_line

WRITERS = 4


class Writer:
    """Writes each file at once, in threads of its own; a customer counts as trained when its file is there."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(WRITERS, "customers")
        self._pending: deque[tuple[Line, Future[None]]] = deque()

    def write(self, name: str, coefficients: Coefficients, path: Path) -> None:
        """Begin to write the file of the customer `name`."""
        line = trained_line(name, path, coefficients.training)
        self._pending.append((line, self._threads.submit(write_coefficients, coefficients, path)))

    def written(self, wait: bool = False) -> Iterator[Line]:
        """The lines of customers whose files have been written since the last call.

        Args:
            wait: until all of them are.

        Raises:
            QrloraError: the disk is full or refuses the write.
        """
        while self._pending and (wait or self._pending[0][1].done()):
            line, future = self._pending.popleft()
            future.result()
            yield line

    def close(self) -> None:
        """End the threads when they have written what they began."""
        self._threads.shutdown(wait=True)
