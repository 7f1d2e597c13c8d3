"""What is reserved: never over the bounds, and nothing when all requests have ended."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrlora_deploy.errors import InputError, MalformedInputError
from qrlora_deploy.serving.engine.admission import Admission, Held, Place
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.pace import LONGEST_S, SHORTEST_S, UNKNOWN_S, Pace
from qrlora_deploy.serving.engine.rows import Load
from qrlora_deploy.serving.refusals import OverloadedError, TooLargeError
from tests.serving.engine.place import Clock

LIMITS = Limits(max_queue_rows=20, max_queue_tokens=300, max_queue_bytes=1000, customer_share=0.6)
CUSTOMERS = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=12)
STEPS = st.lists(
    st.tuples(CUSTOMERS, st.integers(1, 200), st.integers(1, 600), st.integers(0, 10), st.booleans()), max_size=40
)


@given(STEPS)
def test_bounds_hold_and_everything_comes_back(steps: list[tuple[list[str | None], int, int, int, bool]]) -> None:
    admission = Admission(LIMITS, Pace())
    held: list[Place] = []
    for customers, tokens, size, number, smaller in steps:
        try:
            place = admission.reserve(Load(len(customers), tokens, size), customers)
            held.append(place)
        except TooLargeError:
            empty = Admission(LIMITS, Pace())
            with pytest.raises(TooLargeError):
                empty.reserve(Load(len(customers), tokens, size), customers)
            continue
        except OverloadedError as error:
            Admission(LIMITS, Pace()).reserve(Load(len(customers), tokens, size), customers)
            assert held and (error.retry_after_s or 0) > 0
        if held and smaller:
            chosen = held[number % len(held)]
            admission.correct(chosen, Load(chosen.load.rows, chosen.load.tokens // 2 + 1, chosen.load.size_bytes))
        elif held and number > 5:
            gone = held.pop(number % len(held))
            admission.release(gone)
            admission.release(gone)
        total = admission.held
        assert total.rows <= 20 and total.tokens <= 300 and total.size_bytes <= 1000
        assert total.rows == sum(place.load.rows for place in held)
        assert all(load.rows <= 12 and load.tokens <= 180 for load in admission.by_customer.values())
    for place in held:
        admission.release(place)
    assert admission.held == Held() and admission.by_customer == {}


def test_what_is_refused_says_when_to_come_again() -> None:
    pace = Pace()
    admission = Admission(Limits(max_queue_rows=100, customer_share=1), pace)
    admission.reserve(Load(100, 1000, 1000), ["a"] * 100)
    with pytest.raises(OverloadedError) as refused:
        admission.reserve(Load(20, 10, 10), ["b"] * 20)
    assert refused.value.retry_after_s == UNKNOWN_S
    pace.ran(10, 100, 1.0)
    with pytest.raises(OverloadedError) as refused:
        admission.reserve(Load(20, 10, 10), ["b"] * 20)
    assert refused.value.retry_after_s == pytest.approx(2.0), "20 rows of 10 a second"


def paced(clock: Clock) -> Pace:
    """Of an engine that takes 10 ms a token."""
    pace = Pace(clock)
    for _ in range(3):
        pace.begins(100)
        clock.now_s += 1.0
        pace.ran(10, 100, 1.0)
    return pace


def let_in(admission: Admission, tokens: int) -> list[Place]:
    """Requests of one row each, until one is refused; what they have is known at once."""
    places: list[Place] = []
    while len(places) < 50:
        try:
            places.append(admission.reserve(Load(1, 2 * tokens, 1), ["a"]))
        except OverloadedError:
            with pytest.raises(OverloadedError, match="as long as it may take"):
                admission.check_room()
            break
        admission.has_tokens(places[-1], tokens)
        assert len(places) == 50 or admission.held.tokens == tokens * len(places)
    return places


def test_what_is_ahead_is_bounded_by_the_time_that_it_takes() -> None:
    clock = Clock()
    admission = Admission(Limits(max_queue_s=0.5), paced(clock))
    places = let_in(admission, 9)
    assert len(places) == 6, "0.45 s are ahead of the sixth, 0.54 of the next one"
    with pytest.raises(OverloadedError, match="as long as it may take") as refused:
        admission.reserve(Load(2, 2, 2), ["c"] * 2)
    assert refused.value.retry_after_s == SHORTEST_S
    admission.release(places[0])
    admission.reserve(Load(1, 1, 1), ["c"])


def test_two_requests_may_always_be_ahead_of_one() -> None:
    for most_s in (0.0, 0.5):
        assert len(let_in(Admission(Limits(max_queue_s=most_s), paced(Clock())), 100)) == 3


def test_before_anything_has_run_and_without_a_bound_rows_are_all() -> None:
    assert len(let_in(Admission(Limits(max_queue_s=0.0), Pace()), 100)) == 50
    assert len(let_in(Admission(Limits(max_queue_s=None), paced(Clock())), 100)) == 50


def test_of_the_run_under_way_what_is_left_counts() -> None:
    clock = Clock()
    pace = paced(clock)
    pace.begins(100)
    assert pace.ahead_s(100, 1000) == pytest.approx(1.0) and pace.ahead_s(150, 1000) == pytest.approx(1.5)
    clock.now_s += 0.75
    assert pace.ahead_s(150, 1000) == pytest.approx(0.75)
    clock.now_s += 9.0
    assert pace.ahead_s(150, 1000) == pytest.approx(0.5), "it takes longer than was thought, and is not negative"


def test_what_takes_longer_than_the_queue_may_is_let_in_alone() -> None:
    admission = Admission(Limits(max_queue_s=0.5), paced(Clock()))
    alone = admission.reserve(Load(60, 60, 60), ["a"] * 60)
    with pytest.raises(OverloadedError):
        admission.reserve(Load(1, 1, 1), ["b"])
    admission.release(alone)
    admission.check_room()
    admission.reserve(Load(1, 1, 1), ["b"])


@pytest.mark.parametrize("bound", ["max_queue_rows", "max_queue_tokens", "max_queue_bytes"])
def test_a_full_queue_has_room_for_nothing(bound: str) -> None:
    admission = Admission(Limits(customer_share=1, **{bound: 10}), Pace())  # type: ignore[arg-type]
    admission.check_room()
    place = admission.reserve(Load(10, 10, 10), ["a"] * 10)
    with pytest.raises(OverloadedError, match="queue is full"):
        admission.check_room()
    admission.release(place)
    admission.check_room()


def test_a_customer_shares_the_pace_with_the_others() -> None:
    pace = Pace()
    pace.ran(10, 100, 1.0)
    admission = Admission(Limits(max_queue_rows=100, customer_share=0.5), pace)
    admission.reserve(Load(50, 50, 50), ["a"] * 50)
    admission.reserve(Load(1, 1, 1), ["b"])
    with pytest.raises(OverloadedError, match="share") as refused:
        admission.reserve(Load(5, 5, 5), ["a"] * 5)
    assert refused.value.retry_after_s == pytest.approx(1.0), "5 rows of 10 a second for two customers"


def test_the_pace_follows_what_is_measured() -> None:
    pace = Pace()
    assert pace.wait_s(10**9, 10**9) == UNKNOWN_S
    for _ in range(50):
        pace.ran(10, 1000, 0.1)
    assert pace.rows_s == pytest.approx(100) and pace.tokens_s == pytest.approx(10_000)
    assert pace.wait_s(0, 0) == SHORTEST_S and pace.wait_s(10**9, 0) == LONGEST_S
    assert pace.window_tokens(0.1, 16384) == 1000 and pace.window_tokens(0.1, 100) == 400
    assert pace.window_tokens(1e-6, 16384) == 512


def test_requests_that_are_none() -> None:
    admission = Admission(LIMITS, Pace())
    for load, customers in ((Load(0, 0, 0), []), (Load(2, 1, 1), ["a"])):
        with pytest.raises(MalformedInputError, match="a customer for each"):
            admission.reserve(load, customers)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_queue_rows": 0}, "max_queue_rows must be positive, not 0"),
        ({"customer_share": 1.5}, "customer_share must be at most 1"),
        ({"max_queue_s": -1.0}, "max_queue_s must be at least 0, not -1.0"),
        ({"max_wait_s": -1.0}, "max_wait_s must be at least 0"),
        ({"window_s": float("nan")}, "window_s must be positive, not nan"),
    ],
)
def test_limits_that_are_none(limits: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Limits(**limits)  # type: ignore[arg-type]
