"""Customers who are not in memory: each is fetched once for all who wait, and those who ask take turns."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime.table.table import TableFullError
from qrlora_deploy.serving.engine.requests import Request
from qrlora_deploy.serving.engine.running import as_ours
from qrlora_deploy.serving.engine.waiting_room import CLOSED
from qrlora_deploy.serving.refusals import DrainingError


@dataclass(eq=False)
class _Waiting:
    """A request that waits for customers.

    Attributes:
        request: it.
        names: of customers whose turn has not come yet.
        left: of customers who are not there yet.
    """

    request: Request
    names: deque[str]
    left: set[str]


@dataclass(eq=False)
class _Fetch:
    """A customer who is wanted.

    Attributes:
        waiting: for it.
        begun: a thread fetches it.
    """

    waiting: list[_Waiting] = field(default_factory=list)
    begun: bool = False


class Loading:
    """Fetches customers in threads, and gives a request back when all of its customers are there.

    Safe for many threads. Whoever asks (`Load.asker`) has a turn after each of the others, and its requests take turns
    among themselves; so neither a key that asks for many customers nor a request for many keeps others waiting behind
    all of them. A customer that several requests wait for is fetched once; one that fails, fails every request that
    waits for it.

    Args:
        fetch: brings a customer into memory.
        threads: as many customers are fetched at once.
        done: called with a request and None when its customers are there, or with the first error. From any thread.
    """

    def __init__(
        self, fetch: Callable[[str], None], threads: int, done: Callable[[Request, QrloraError | None], None]
    ) -> None:
        self._fetch, self._done = fetch, done
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="customer-loader")
        self._lock = threading.Lock()
        # All that follows is read and written under the lock.
        self._fetches: dict[str, _Fetch] = {}
        self._turns: OrderedDict[str, deque[_Waiting]] = OrderedDict()

    def add(self, request: Request, customers: Sequence[str]) -> None:
        """Fetch customers, one at least, for a request.

        Raises:
            DrainingError: it is closed.
        """
        waiting = _Waiting(request, deque(), set(customers))
        with self._lock:
            for name in dict.fromkeys(customers):
                fetch = self._fetches.setdefault(name, _Fetch())
                fetch.waiting.append(waiting)
                if not fetch.begun:
                    waiting.names.append(name)
            if waiting.names:
                self._turns.setdefault(request.place.load.asker, deque()).append(waiting)
            turns = len(waiting.names)
        try:
            for _ in range(turns):
                self._pool.submit(self._one)
        except RuntimeError as error:  # The pool was shut down.
            raise DrainingError(CLOSED) from error

    def close(self) -> None:
        """Fetch nobody more; whom a thread fetches now is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _one(self) -> None:
        """Fetch the customer whose turn it is. In a thread of the pool."""
        name = self._draw()
        if name is None:
            return
        error = None
        try:
            self._fetch(name)
        except TableFullError:
            pass  # Where runs hold all of a small table, the batch that the row comes into finds room.
        except Exception as failure:
            error = as_ours(failure)
        for request in self._finished(name, error):
            self._done(request, error)

    def _draw(self) -> str | None:
        """Whose turn it is; None where every customer was begun meanwhile, or nobody waits any more."""
        with self._lock:
            while self._turns:
                asker, requests = self._turns.popitem(last=False)
                waiting = requests.popleft()
                name = self._next_name(waiting)
                if waiting.names:
                    requests.append(waiting)
                if requests:
                    self._turns[asker] = requests
                if name is not None:
                    self._fetches[name].begun = True
                    return name
        return None

    def _next_name(self, waiting: _Waiting) -> str | None:
        if waiting.request.ended:
            self._give_up(waiting)
        while waiting.names:
            name = waiting.names.popleft()
            if name in self._fetches and not self._fetches[name].begun:
                return name
        return None

    def _give_up(self, waiting: _Waiting) -> None:
        """A request that has ended, such as by its deadline, waits for nobody."""
        waiting.names.clear()
        for name in waiting.left:
            fetch = self._fetches.get(name)
            if fetch is not None and not fetch.begun:
                fetch.waiting.remove(waiting)
                if not fetch.waiting:
                    del self._fetches[name]

    def _finished(self, name: str, error: QrloraError | None) -> list[Request]:
        """Requests that wait no longer."""
        with self._lock:
            fetch = self._fetches.pop(name)
            for waiting in fetch.waiting:
                waiting.left.discard(name)
            return [waiting.request for waiting in fetch.waiting if error is not None or not waiting.left]
