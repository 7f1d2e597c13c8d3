"""A CUDA graph is captured while nothing else of this process works on its GPUs.

ONNX Runtime captures in the mode in which CUDA refuses what any other thread of the process allocates or waits for on a
device, and ends the capture for it: one session's first run in a bucket would fail another session's batch, and be
failed by it. So what runs on a GPU takes its turn here. Copies of `runtime/table/cuda.py` need none: their threads tell
CUDA that they leave captures alone.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Captures:
    """Turns of runs, any number of them together, and of captures, each of them alone.

    Whoever waits for a capture comes before runs that begin later. A turn within a turn of the same thread would wait
    for itself: only what calls ONNX Runtime takes one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._runs = self._waiting = 0
        self._capturing = False
        self.beside: AbstractContextManager[Any] = _Turn(self._begin_run, self._end_run)
        self.alone: AbstractContextManager[Any] = _Turn(self._begin_capture, self._end_capture)

    def of(self, on_gpu: bool, captures: bool = False) -> AbstractContextManager[Any]:
        """The turn of a run; on a CPU none is needed."""
        return (self.alone if captures else self.beside) if on_gpu else nullcontext()

    def _begin_run(self) -> None:
        with self._changed:
            while self._capturing or self._waiting:
                self._changed.wait()
            self._runs += 1

    def _end_run(self) -> None:
        with self._changed:
            self._runs -= 1
            if not self._runs:
                self._changed.notify_all()

    def _begin_capture(self) -> None:
        with self._changed:
            self._waiting += 1
            try:
                while self._capturing or self._runs:
                    self._changed.wait()
                self._capturing = True
            finally:
                self._waiting -= 1

    def _end_capture(self) -> None:
        with self._changed:
            self._capturing = False
            self._changed.notify_all()


class _Turn:
    def __init__(self, begin: Any, end: Any) -> None:
        self._begin, self._end = begin, end

    def __enter__(self) -> None:
        self._begin()

    def __exit__(self, *_: object) -> None:
        self._end()


CAPTURES = Captures()
"""Of this process."""
