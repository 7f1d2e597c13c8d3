"""What an engine tells of waits and runs: each row once, at the times of the engine's own clock."""

import threading

import pytest

from qrlora_deploy.serving.engine.durations import ERROR, LEAST_S, percentile
from qrlora_deploy.serving.engine.local import LocalEngine
from tests.serving.engine.place import Clock, WatchedSession, a_row, ask


def test_waits_and_runs_are_those_of_the_clock(session: WatchedSession) -> None:
    clock, answer, began = Clock(), session.answer, threading.Event()

    def takes_a_quarter(*arguments: object) -> object:
        began.set()
        found = answer(*arguments)  # type: ignore[arg-type]
        clock.now_s += 0.25
        return found

    session.answer = takes_a_quarter  # type: ignore[assignment, method-assign]
    with LocalEngine(session, clock=clock) as engine:
        for number in range(8):
            (first, second) = ask(engine, [a_row(5), a_row(5, f"c{number}")]).result(30)
            assert first.run == second.run and first.run is not None
            assert (first.run.start_s, first.run.end_s) == (100 + number / 4, 100.25 + number / 4)
            assert (first.run.rows, first.run.padded_tokens) == (2, 10)
        stats = engine.stats()
        assert sum(stats.queue_counts) == stats.rows == 16
        # Nobody waited, by this clock.
        assert stats.queue_s == 0 and percentile(stats.queue_counts, 100) < LEAST_S
        session.gate.clear()
        began.clear()
        busy = ask(engine, [a_row(5)])
        assert began.wait(30)
        waiting = ask(engine, [a_row(6), a_row(6, "c1"), a_row(6, "c2")])
        clock.now_s += 3.0
        session.gate.set()
        assert len(busy.result(30)) == 1 and len(waiting.result(30)) == 3
        after = engine.stats().since(stats)
    assert sum(after.queue_counts) == after.rows == 4
    # A quarter of a second of the busy run is among it.
    assert percentile(after.queue_counts, 99) == pytest.approx(3.25, rel=ERROR * 1.01)
    assert after.queue_s == pytest.approx(3 * 3.25)
