"""Batches of any rows: every row in one of them, within the bounds of a run, with little padding."""

from hypothesis import given
from hypothesis import strategies as st

from qrlora_deploy.runtime import Buckets
from qrlora_deploy.serving.engine.admission import Place
from qrlora_deploy.serving.engine.batching import Shapes, cut
from qrlora_deploy.serving.engine.requests import Request, WaitingRow
from qrlora_deploy.serving.engine.rows import Load

LENGTHS = st.lists(st.integers(1, 100), max_size=60)
BUCKETS = st.builds(
    lambda batches, lengths: Buckets(tuple(batches), tuple(lengths)),
    st.sets(st.integers(1, 40), min_size=1, max_size=4),
    st.sets(st.integers(1, 120), min_size=1, max_size=4),
)


def waiting(lengths: list[int]) -> list[WaitingRow]:
    request = Request(Place(Load(1, 1, 1), {None: 1}), [], 0.0)
    return [WaitingRow(request, number, None, length) for number, length in enumerate(lengths)]


@given(LENGTHS, st.integers(1, 400), st.integers(0, 200), st.none() | BUCKETS)
def test_every_row_is_in_one_batch_within_the_bounds(
    lengths: list[int], most: int, padding: int, buckets: Buckets | None
) -> None:
    rows, shapes = waiting(lengths), Shapes(most, padding, buckets)
    batches = cut(rows, shapes)
    assert sorted(row.number for batch in batches for row in batch) == list(range(len(rows)))
    for batch in batches:
        longest = max(shapes.length(row.length) for row in batch)
        fitting = buckets.fit(len(batch), longest) if buckets else None
        if buckets and buckets.fit(1, longest):
            assert fitting is not None, "a batch that a bucket could hold in parts fits one"
        size = fitting[0] if fitting else len(batch)
        assert size * longest <= most or len(batch) == 1 or size == min(buckets.batches if buckets else ())
        assert sum(longest - shapes.length(row.length) for row in batch) <= padding
    firsts = [min(row.number for row in batch) for batch in batches]
    assert firsts == sorted(firsts), "the batch of the first row comes first"


def test_rows_of_similar_length_share_a_batch() -> None:
    rows = waiting([100, 5, 98, 6, 100, 5])
    batches = cut(rows, Shapes(1000, 10))
    assert [[row.length for row in batch] for batch in batches] == [[100, 100, 98], [6, 5, 5]]
    together = cut(rows, Shapes(1000, 1000))
    assert [len(batch) for batch in together] == [6]


def test_a_bucket_is_not_left_half_empty() -> None:
    shapes = Shapes(10**6, 16, Buckets((1, 4, 16), (8, 32)))
    assert [len(batch) for batch in cut(waiting([8] * 21), shapes)] == [16, 4, 1]
    assert [len(batch) for batch in cut(waiting([8] * 15), shapes)] == [15], "one row of 8 tokens is less than a run"
    assert [len(batch) for batch in cut(waiting([40] * 5), shapes)] == [5], "what fits no bucket runs as it is"
