"""How long a run takes, learnt from runs: the line that they follow, whatever their sizes were."""

import numpy as np
import pytest

from qrlora_deploy.serving.engine.run_time import RunTime


def learnt(tokens: "list[int]", every_s: float, each_s: float, noise: float = 0.0) -> RunTime:
    """From runs of such sizes, the first one slow."""
    random, found = np.random.default_rng(0), RunTime()
    for number, size in enumerate(tokens):
        seconds = (every_s + each_s * size) * (1 + noise * abs(random.normal()))
        found.add(size, 5.0 if not number else seconds)
    return found


SIZES = np.random.default_rng(1).integers(8, 200, 100).tolist()


@pytest.mark.parametrize(("every_s", "each_s"), [(2e-3, 1e-5), (0.0, 4e-4), (5e-3, 0.0)])
def test_the_line_that_runs_follow(every_s: float, each_s: float) -> None:
    found = learnt(SIZES, every_s, each_s)
    # numpy's own fit of the same runs; the prior takes some of it where the first part is nearly all.
    slope, cut = np.polyfit(SIZES, every_s + each_s * np.array(SIZES), 1)
    for tokens in (16, 100, 400):
        assert found.of(tokens) == pytest.approx(cut + slope * tokens, rel=0.2)
    assert found.of(100, runs=3) == pytest.approx(3 * found.every_s + 100 * found.each_s)


def test_runs_of_one_size_cost_their_tokens_alone() -> None:
    found = learnt([40] * 20, 1e-3, 1e-4)
    assert found.every_s == pytest.approx(0, abs=1e-9) and found.of(80) == pytest.approx(0.010)


def test_what_is_far_off_counts_little_and_a_change_is_followed() -> None:
    found = learnt(SIZES, 1e-3, 1e-4)
    before = found.of(100)
    found.add(100, 40 * before)
    assert found.of(100) < 1.5 * before
    for size in SIZES:
        found.add(size, 10 * (1e-3 + 1e-4 * size))
    assert found.of(100) == pytest.approx(10 * before, rel=0.1)


def test_neither_part_is_negative_and_before_the_first_run_there_is_none() -> None:
    found = RunTime()
    assert found.of(1000) == 0
    for size in SIZES:
        found.add(size, 1e-3 - 1e-6 * size)
        assert found.each_s >= 0 and found.every_s >= 0
