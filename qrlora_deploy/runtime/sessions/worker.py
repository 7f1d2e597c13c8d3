"""One thread that does what many threads ask for, in order."""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

from qrlora_deploy.runtime.host.forking import survive_forks


class Worker:
    """A thread that calls what it is given, in order; it ends when nobody refers to this any more.

    A pool of the standard library takes ten times as long to hand a call over.
    """

    def __init__(self) -> None:
        self._start()
        survive_forks(self)

    def _start(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(self._jobs,), name="bucket-runner", daemon=True).start()
        weakref.finalize(self, self._jobs.put, None).atexit = False

    def before_fork(self) -> None:
        """Nothing to do: calls that are under way go on in the parent."""

    def after_fork(self, in_child: bool) -> None:
        """A forked child has no other thread than the one that forked; it gets a new one."""
        if in_child:
            self._start()

    def call(self, work: Callable[[], Any]) -> Any:
        """Call `work` in the thread and wait; gives back, or raises, what it does."""
        job = _Job(work)
        self._jobs.put(job)
        job.done.acquire()
        if job.error is not None:
            raise job.error
        return job.result


class _Job:
    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()

    def finish(self) -> None:
        """Do the work and let the one who waits go on."""
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error
        finally:
            self.done.release()


def _serve(jobs: "queue.SimpleQueue[_Job | None]") -> None:
    while (job := jobs.get()) is not None:
        job.finish()
        # Not kept until the next one comes: it refers to the owner of this thread.
        del job
