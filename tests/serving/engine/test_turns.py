"""Threads take turns in the order in which they came."""

import threading
import time

import pytest

from qrlora_deploy.serving.engine.turns import Turns


def test_whoever_waits_longest_is_next() -> None:
    turns, order = Turns(), []

    def take(number: int) -> None:
        with turns:
            order.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    with turns:
        for number, thread in enumerate(threads):
            thread.start()
            while len(turns._waiting) <= number:
                time.sleep(0.001)
        assert order == []
    for thread in threads:
        thread.join(30)
    assert order == list(range(8))


def test_one_at_a_time_whatever_is_raised() -> None:
    turns, inside, most = Turns(), 0, 0

    def hammer() -> None:
        nonlocal inside, most
        for number in range(500):
            with pytest.raises(KeyError), turns:
                inside += 1
                most = max(most, inside)
                if number % 50 == 0:
                    time.sleep(0)
                inside -= 1
                raise KeyError

    threads = [threading.Thread(target=hammer) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 1 and not turns._busy and not turns._waiting
