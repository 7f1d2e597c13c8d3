"""What has threads or locks in a process that forks: one place that looks after them.

After `os.fork` only the thread that forked lives on in the child, and a lock that another one held
stays locked there for ever. Whoever registers here is asked before the fork and told after it.
"""

import os
import threading
import weakref
from typing import Protocol

LOST_ON_GPU = "a session on a GPU cannot be used in a forked process; open it after the fork"


class Forkable(Protocol):
    """Something that goes on in a forked child."""

    def before_fork(self) -> None:
        """Take the locks whose state must be whole in the child."""

    def after_fork(self, in_child: bool) -> None:
        """Give these locks back; in the child also replace threads, and locks that somebody may have held."""


_known: "weakref.WeakSet[Forkable]" = weakref.WeakSet()
_forking = threading.Lock()
_asked: list[Forkable] = []


def survive_forks(item: Forkable) -> None:
    """Have `item` asked and told, as long as somebody refers to it."""
    _known.add(item)


def _before() -> None:
    # One fork at a time: two of them would take the locks in different orders.
    _forking.acquire()
    for item in list(_known):
        item.before_fork()
        _asked.append(item)


def _after(in_child: bool) -> None:
    asked = _asked[:]
    _asked.clear()
    # Whoever starts a thread in here finds no fork under way.
    _forking.release()
    for item in asked:
        item.after_fork(in_child)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=lambda: _after(in_child=False), after_in_child=lambda: _after(in_child=True)
    )
