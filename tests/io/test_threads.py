"""Waiting for threads while signals come: what was begun is done, and the signal is raised afterwards."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import pytest

from qrlora_deploy.io.threads import finish, join_all

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs SIGUSR1")


@pytest.fixture
def interrupting() -> Iterator[None]:
    """SIGUSR1 raises as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("interrupting")
def test_a_thread_is_waited_for_however_many_signals_come() -> None:
    asked, waited_for = list[int](), threading.Event()

    def interrupt_often() -> None:
        assert waited_for.wait(20)
        for _ in range(60):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.003)
        time.sleep(0.1)

    worker = threading.Thread(target=interrupt_often)
    worker.start()

    def join() -> None:
        waited_for.set()
        worker.join()

    with pytest.raises(KeyboardInterrupt):
        finish(join, lambda: asked.append(1))
    assert not worker.is_alive() and asked


@pytest.mark.usefixtures("interrupting")
def test_a_start_that_is_cut_short_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    start, starts = threading.Thread.start, list[int]()

    def cut_short(thread: threading.Thread) -> None:
        starts.append(1)
        if len(starts) > 1:
            start(thread)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(threading.Thread, "start", cut_short)
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        finish(lambda: done.append(1))
    assert done and len(starts) >= 2


def test_what_the_work_raises_comes_through() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        finish(fail)


def test_threads_that_never_began_are_not_waited_for() -> None:
    ran: list[int] = []
    begun = threading.Thread(target=ran.append, args=(1,))
    begun.start()
    join_all([threading.Thread(target=ran.append, args=(2,)), begun])
    assert ran == [1]
