"""Rows of a running batch: each answers as alone and as PyTorch does, whoever joins and leaves beside it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrlora_deploy.runtime.generation.budget import CacheFullError
from qrlora_deploy.runtime.generation.cache import KvCache
from tests.runtime.generation.tiny import NAMES, Desk, Made, answer_of, make_decoder, prompt_of

pytestmark = pytest.mark.makes

JOINS = int(os.environ.get("QRLORA_JOINS", "300"))
"""How often rows join and leave beside one that goes on; 10,000 take minutes."""

OWNERS = (None, *NAMES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_decoder(tmp_path_factory.mktemp("decoder"))


def logits_of(desk: Desk) -> dict[int, list[np.ndarray]]:
    """Collects the logits by which each request's tokens are chosen, by its number."""
    found: dict[int, list[np.ndarray]] = {}
    for running in desk.asked:
        choose, rows = running.writer.sampler.choose, found.setdefault(running.number, [])

        def note(logits: np.ndarray, choose=choose, rows=rows):  # type: ignore[no-untyped-def]
            rows.append(logits.copy())
            return choose(logits)

        running.writer.sampler.choose = note  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2"])
def test_rows_of_different_customers_answer_as_alone_and_as_pytorch(family: str, tmp_path: Path) -> None:
    made = make_decoder(tmp_path, family)
    asked = [(prompt_of(seed, length), OWNERS[seed % 4]) for seed, length in enumerate((3, 21, 1, 40, 8, 16, 7, 30))]
    desk = Desk(made, max_rows=4)
    together = [desk.ask(prompt, customer, 20) for prompt, customer in asked]
    desk.finish()
    answers = [list(answer_of(running).tokens) for running in together]
    assert answers == [list(Desk(made).alone(prompt, customer, 20).tokens) for prompt, customer in asked]
    assert answers == [made.by_torch(prompt, customer, 20) for prompt, customer in asked]
    # The customers matter: some prompt has different answers.
    different = [len({tuple(desk.alone(prompt, owner, 20).tokens) for owner in OWNERS}) for prompt, _ in asked[:4]]
    assert max(different) >= 3
    assert desk.holders.held == 0


def test_in_one_bucket_a_row_is_bit_equal_whether_the_others_are_empty_or_full(made: Made) -> None:
    prompt = prompt_of(1, 19)
    desk = Desk(made, max_rows=4, batches=(4,))
    desk.ask(prompt, "one", 12)
    alone = logits_of(desk)
    desk.finish()
    full = Desk(made, max_rows=4, batches=(4,))
    for seed in (5, 6, 7):
        full.ask(prompt_of(seed, 3 * seed), OWNERS[seed % 4], 30, temperature=1.0, seed=seed)
    for _ in range(4):
        full.engine.step()
    joined = full.ask(prompt, "one", 12)
    beside = logits_of(full)
    full.finish()
    np.testing.assert_array_equal(np.stack(beside[joined.number]), np.stack(alone[0]))


@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whoever_joins_leaves_or_is_cancelled_the_others_do_not_notice(made: Made, data: st.DataObject) -> None:
    """Random comings and goings in one bucket: every answer is that of the same request alone, draws included."""
    desk = Desk(made, max_rows=4, batches=(4,), capacities=(16, 64))
    requests = {}
    for _step in range(data.draw(st.integers(1, 25))):
        if data.draw(st.booleans()):
            seed, length = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 30))
            asked = (prompt_of(seed, length), data.draw(st.sampled_from(OWNERS)), data.draw(st.integers(1, 20)))
            requests[desk.ask(*asked, temperature=0.8, seed=seed)] = (*asked, seed)
        if requests and data.draw(st.integers(0, 4)) == 0:
            data.draw(st.sampled_from(list(requests))).cancelled = True
        desk.engine.step()
    desk.finish()
    for running, (prompt, customer, new, seed) in requests.items():
        expected = Desk(made, max_rows=4, batches=(4,), capacities=(16, 64)).alone(
            prompt, customer, new, temperature=0.8, seed=seed
        )
        answer = answer_of(running)
        assert answer.tokens == expected.tokens[: len(answer.tokens)]
        assert answer.finish_reason == "cancelled" or answer.tokens == expected.tokens
    assert desk.holders.held == 0 and desk.budget.used == desk.prefixes.used


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batches", [(3,), (1, 2, 3)])
def test_a_row_goes_on_while_others_join_and_leave_many_times(made: Made, batches: tuple[int, ...]) -> None:
    desk = Desk(made, max_rows=3, batches=batches)
    alone = {
        number: Desk(made, max_rows=3, batches=(3,)).alone(prompt_of(number, 5), "one", 50).tokens
        for number in range(3)
    }
    shorts = {owner: Desk(made, max_rows=3, batches=(3,)).alone(prompt_of(9, 4), owner, 2).tokens for owner in OWNERS}
    longs, left = [desk.ask(prompt_of(0, 5), "one", 50)], 0
    while left < JOINS:
        owner = OWNERS[left % 4]
        short = desk.ask(prompt_of(9, 4), owner, 2)
        while not short.events or short.events[-1].answer is None:
            desk.engine.step()
        assert answer_of(short).tokens == shorts[owner]
        left += 1
        if longs[-1].events and longs[-1].events[-1].answer is not None:
            longs.append(desk.ask(prompt_of(len(longs) % 3, 5), "one", 50))
    desk.finish()
    for number, running in enumerate(longs):
        assert answer_of(running).tokens == alone[number % 3]


def test_across_batches_tokens_are_equal_where_the_best_is_clear(made: Made) -> None:
    """Other shapes give sums in another order; a token may differ only where the two best are this close."""
    prompt = prompt_of(3, 12)
    found = {}
    for size in (1, 2, 8):
        desk = Desk(made, max_rows=size, batches=(size,))
        desk.ask(prompt, "two", 30)
        found[size] = logits_of(desk)
        desk.finish()
    rows = {size: np.stack(logits[0]) for size, logits in found.items()}
    best = np.sort(rows[1], axis=1)[:, -2:]
    for size in (2, 8):
        differing = np.flatnonzero(rows[size].argmax(1) != rows[1].argmax(1))
        first = differing[0] if len(differing) else len(best)
        np.testing.assert_allclose(rows[size][:first], rows[1][:first], rtol=1e-4, atol=1e-4)
        assert first == len(best) or np.diff(best[first])[0] < 2e-4


def test_a_prompt_that_begins_alike_is_not_read_twice_and_answers_alike(made: Made) -> None:
    desk = Desk(made, batches=(4,))
    common = prompt_of(1, 20)
    first = desk.alone(common, "one")
    again = desk.alone(common, "one")
    assert (first.reused_tokens, again.reused_tokens) == (0, 16)
    assert again.tokens == first.tokens
    longer = [*common, *prompt_of(2, 9)]
    reusing, fresh = desk.alone(longer, "one"), Desk(made, batches=(4,)).alone(longer, "one")
    assert reusing.reused_tokens == 16 and reusing.tokens == fresh.tokens
    # Another customer reads it by other numbers.
    other = desk.alone(common, "two")
    assert other.reused_tokens == 0 and other.tokens == Desk(made, batches=(4,)).alone(common, "two").tokens
    # A prompt of whole blocks keeps one token to read.
    assert [desk.alone(common[:16], "one").reused_tokens for _ in range(2)] == [8, 8]


def test_beginnings_give_way_to_rows(made: Made) -> None:
    row = DeskBytes(made).row
    desk = Desk(made, max_rows=2, batches=(1, 2), max_bytes=2 * row)
    expected = desk.alone(prompt_of(1, 30), "one").tokens
    assert desk.prefixes.used > 0
    both = [desk.ask(prompt_of(1, 30), "one"), desk.ask(prompt_of(1, 30), "one")]
    desk.finish()
    assert [answer_of(running).tokens for running in both] == [expected] * 2
    assert desk.budget.peak <= 2 * row


class DeskBytes:
    """Bytes of a row of 64 tokens."""

    def __init__(self, made: Made) -> None:
        self.row = Desk(made).graph.cache_shape.token_bytes(64)


def test_running_answers_are_not_starved_by_long_prompts(made: Made) -> None:
    desk = Desk(made, max_rows=4)
    running = desk.ask(prompt_of(0, 2), None, 30)
    desk.engine.step()
    for seed in (1, 2, 3):
        desk.ask(prompt_of(seed, 50), None, 4)
    for _ in range(6):
        before = len(running.writer.choices)
        desk.engine.step()
        assert len(running.writer.choices) == before + 1
    # Two blocks of eight a step: 96 of the 150 tokens by now.
    assert sum(other.seat.past for other in desk.asked[1:] if other.seat) <= 96 + 3 * 4


def test_a_deadline_ends_an_answer_as_it_is(made: Made) -> None:
    desk = Desk(made, max_rows=1)
    running, waiting = (
        desk.ask(prompt_of(0, 5), None, 30, deadline=5.0),
        desk.ask(prompt_of(1, 5), None, 30, deadline=5.0),
    )
    for _ in range(4):
        desk.engine.step()
    desk.now = 5.0
    desk.finish()
    answer = answer_of(running)
    assert answer.finish_reason == "deadline" and len(answer.tokens) == 4 + 1
    assert answer_of(waiting).finish_reason == "deadline" and answer_of(waiting).tokens == ()
    assert desk.holders.held == 0


def test_a_customer_that_is_gone_by_the_time_ends_its_request_alone(made: Made) -> None:
    desk = Desk(made)
    gone, other = desk.ask(prompt_of(0, 5), "nobody"), desk.ask(prompt_of(0, 5), "one")
    desk.finish()
    error = answer_of(gone).error
    assert answer_of(gone).finish_reason == "error" and error is not None and "nobody" in str(error)
    assert answer_of(other).tokens == Desk(made).alone(prompt_of(0, 5), "one").tokens


def test_numbers_that_are_not_finite_end_their_row_alone(made: Made) -> None:
    desk = Desk(made, batches=(4,))
    good, bad = desk.ask(prompt_of(0, 5), "one"), desk.ask(prompt_of(0, 5), "two")
    desk.holders.memory.parts["coefficient_table"].array[2] = np.nan
    desk.finish()
    assert "two: the model gave nan" in str(answer_of(bad).error)
    assert answer_of(good).tokens == Desk(made, batches=(4,)).alone(prompt_of(0, 5), "one").tokens
    # The row is as good as new for whoever gets it next.
    assert (
        desk.alone(prompt_of(3, 5), "three").tokens == Desk(made, batches=(4,)).alone(prompt_of(3, 5), "three").tokens
    )


class NoMemory:
    """A session that says what ONNX Runtime does where memory ends, in its runs of so many rows."""

    def __init__(self, session: Any, runs: range) -> None:
        self._session, self._runs, self.run = session, runs, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.run += 1
        if self.run in self._runs:
            raise RuntimeError("[E] : AllocateRawInternal Failed to allocate memory for requested buffer of size 9")
        self._session.run_with_iobinding(binding, options)


@pytest.mark.parametrize("runs", [range(2, 3), range(5, 6)], ids=["a prompt", "a token"])
def test_where_memory_ends_within_a_run_the_cache_is_full(made: Made, runs: range) -> None:
    desk = Desk(made)
    desk.graph._session = NoMemory(desk.graph._session, runs)
    asked = [desk.ask(prompt_of(seed, 5), "one") for seed in range(3)]
    desk.finish()
    errors = [answer_of(running).error for running in asked]
    # The second prompt; or the second token of all three.
    failed = [error for error in errors if error is not None]
    assert len(failed) == (1 if runs.start == 2 else 3) and all(isinstance(error, CacheFullError) for error in failed)
    assert str(failed[0]).startswith("cache full: no memory is left to run")
    assert desk.alone(prompt_of(0, 5), "one").tokens == Desk(made).alone(prompt_of(0, 5), "one").tokens
    assert desk.holders.held == 0


def test_where_memory_ends_for_rows_those_that_are_there_go_on(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(made)
    empty = KvCache._empty
    most = 2

    def limited(self: KvCache, rows: int) -> np.ndarray:
        if rows > most:
            raise MemoryError
        return empty(self, rows)

    monkeypatch.setattr(KvCache, "_empty", limited)
    asked = [desk.ask(prompt_of(seed, 5), "one") for seed in range(5)]
    desk.finish()
    assert [answer_of(running).tokens for running in asked] == [
        Desk(made).alone(prompt_of(seed, 5), "one").tokens for seed in range(5)
    ]
    most = 0
    refused = desk.ask(prompt_of(0, 5), "one")
    desk.finish()
    error = answer_of(refused).error
    assert isinstance(error, CacheFullError) and str(error).startswith("cache full: there is no memory for")
    most = 1
    assert desk.alone(prompt_of(0, 5), "one").error is None
