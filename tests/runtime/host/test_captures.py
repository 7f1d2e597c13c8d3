"""Captures are alone; runs are together."""

import threading
from contextlib import nullcontext

from qrlora_deploy.runtime.host.captures import CAPTURES, Captures


def test_a_capture_is_alone_and_runs_are_not() -> None:
    turns = Captures()
    together, inside, most = threading.Barrier(3, timeout=20), 0, 0
    lock, wrong = threading.Lock(), []

    def run() -> None:
        nonlocal inside, most
        with turns.beside:
            # Passes where three runs are under way at once.
            together.wait()
        for _ in range(200):
            with turns.beside:
                with lock:
                    inside += 1
                    most = max(most, inside)
                with lock:
                    inside -= 1

    def capture() -> None:
        nonlocal inside
        for _ in range(50):
            with turns.alone:
                with lock:
                    wrong.append(inside)
                    inside += 100
                with lock:
                    inside -= 100

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    threads += [threading.Thread(target=capture) for _ in range(2)]
    for thread in threads[3:]:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == [0] * 100 and most < 100


def test_whoever_waits_for_a_capture_comes_before_later_runs() -> None:
    turns, order = Captures(), []
    begun, asked = threading.Event(), threading.Event()

    def run(name: str) -> None:
        with turns.beside:
            order.append(name)

    def capture() -> None:
        asked.set()
        with turns.alone:
            order.append("capture")

    with turns.beside:
        capturing = threading.Thread(target=capture)
        capturing.start()
        asked.wait(20)
        while not turns._waiting:
            begun.wait(0.001)
        later = threading.Thread(target=run, args=("later",))
        later.start()
        later.join(0.05)
        assert later.is_alive() and order == []
    capturing.join(20)
    later.join(20)
    assert order == ["capture", "later"]


def test_a_run_that_fails_gives_its_turn_back() -> None:
    turns = Captures()
    for turn in (turns.alone, turns.beside, turns.alone):
        try:
            with turn:
                raise ValueError
        except ValueError:
            pass
    with turns.alone:
        pass


def test_a_cpu_waits_for_nobody() -> None:
    assert isinstance(CAPTURES.of(False), nullcontext) and isinstance(CAPTURES.of(False, captures=True), nullcontext)
    assert CAPTURES.of(True) is CAPTURES.beside and CAPTURES.of(True, captures=True) is CAPTURES.alone
