"""What one rendering of a chat template may take: characters, steps, and time of the processor."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from qrlora_deploy.errors import InputError

MAX_TEXT = 4 * 2**20
"""Characters of a text, also of one on the way."""

MAX_WORK = 64 * 2**20
"""Characters that are made on the way, each step counted as `STEP` of them."""

STEP = 64
"""What takes the time of a step makes about as many characters."""

MAX_NODES = 100_000
"""Values within a value, each counted as often as it is met."""

MAX_BITS = 4096
"""Of a whole number."""

MAX_SECONDS = 5.0
"""Of the thread's own time on a processor, so that a busy machine refuses nothing."""

PLAIN = (str, int, float, bool, type(None))


class Budget:
    """What is left to one rendering."""

    def __init__(self) -> None:
        self.work = MAX_WORK
        self.end = time.thread_time() + MAX_SECONDS

    def take(self, characters: int = 0) -> None:
        """Count a step that makes so many characters.

        Raises:
            InputError: nothing is left.
        """
        self.work -= characters + STEP
        if self.work < 0:
            raise InputError(f"it does more than {MAX_WORK:,} characters are worth")
        if time.thread_time() > self.end:
            raise InputError(f"it takes more than {MAX_SECONDS:g} seconds")

    def value(self, value: Any) -> Any:
        """A value that was made, counted.

        Raises:
            InputError: it is too large.
        """
        if isinstance(value, str):
            if len(value) > MAX_TEXT:
                raise InputError(f"it makes a text of more than {MAX_TEXT:,} characters")
            self.take(len(value))
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise InputError(f"it makes a number of more than {MAX_BITS:,} bits")
        elif isinstance(value, (list, tuple, dict, set, frozenset)):
            self.take(_nodes(value, MAX_NODES))
        return value

    def text(self, value: Any) -> str:
        """`str(value)`, counted before it is made where it may be large."""
        if not isinstance(value, PLAIN):
            # A list that holds another one twice, which holds another one twice, is short and its text is not.
            self.value(value)
        found: str = self.value(str(value))
        return found


def _nodes(value: Any, left: int) -> int:
    """How many values a container holds, with their own.

    Raises:
        InputError: more than `left`.
    """
    count = 1
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    for part in parts:
        count += _nodes(part, left - count) if isinstance(part, (list, tuple, dict, set, frozenset)) else 1
        if count > left:
            raise InputError(f"it makes a value of more than {MAX_NODES:,} parts")
    return count


_CURRENT: ContextVar[Budget] = ContextVar("budget")


def budget() -> Budget:
    """That of the rendering that is under way."""
    return _CURRENT.get()


@contextmanager
def new_budget() -> Iterator[None]:
    """A budget for one rendering, in this thread alone."""
    token = _CURRENT.set(Budget())
    try:
        yield
    finally:
        _CURRENT.reset(token)
