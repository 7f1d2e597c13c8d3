"""A process that hangs is told from one that is slow, was stopped with everybody, or has much to do."""

import asyncio

import pytest

from qrlora_deploy.serving.processes.heartbeat import Heart, kill_if_it_hangs

HANG_S, STEP_S = 3.0, 1.0


def test_silence_is_counted_until_it_speaks() -> None:
    heart = Heart(HANG_S, STEP_S)
    assert [heart.felt(pulse) for pulse in (None, None, {}, None, None)] == [""] * 5
    assert heart.felt(None) == "did not answer for 3 s"


def test_one_run_that_does_not_end_counts_and_many_runs_do_not() -> None:
    heart = Heart(HANG_S, STEP_S)
    assert {heart.felt({"bert": number, "mpnet": 0}) for number in range(1, 20)} == {""}
    assert [heart.felt({"bert": 20, "mpnet": 7}) for _ in range(3)] == [""] * 3
    assert heart.felt({"bert": 20, "mpnet": 8}) == "had a run of bert that took more than 3 s"


def test_an_engine_with_nothing_to_do_is_left_alone() -> None:
    heart = Heart(HANG_S, STEP_S)
    assert {heart.felt({"bert": 0}) for _ in range(20)} == {""}


class Process:
    """Answers until it does not."""

    def __init__(self, answers: int) -> None:
        self.ready, self.answers = asyncio.Event(), answers
        self.pulse: dict[str, int] | None = None
        self.killed: list[str] = []

    def ask_pulse(self) -> None:
        self.pulse, self.answers = ({} if self.answers > 0 else None), self.answers - 1

    def kill(self, what_it_did: str = "") -> None:
        self.killed.append(what_it_did)


@pytest.mark.parametrize("hang_s", [0.08, 0.0])
def test_it_is_killed_once_and_never_before_it_was_ready_or_without_a_bound(hang_s: float) -> None:
    async def play() -> Process:
        process = Process(answers=3)
        following = asyncio.create_task(kill_if_it_hangs(process, hang_s, asyncio.Event()))
        await asyncio.sleep(0.2)
        assert process.answers == 3
        process.ready.set()
        await asyncio.wait_for(following, 20)
        return process

    assert asyncio.run(play()).killed == (["did not answer for 0.08 s"] if hang_s else [])


def test_who_ends_is_not_killed() -> None:
    async def play() -> Process:
        process, ending = Process(answers=0), asyncio.Event()
        process.ready.set()
        ending.set()
        await asyncio.wait_for(kill_if_it_hangs(process, 0.08, ending), 20)
        return process

    assert asyncio.run(play()).killed == []
