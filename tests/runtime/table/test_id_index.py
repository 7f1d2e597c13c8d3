"""The index of ids against a dictionary, also where every fingerprint is shared."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.coefficients import CUSTOMER_ID, MAX_ID_CHARACTERS
from qrlora_deploy.runtime.table import id_index
from qrlora_deploy.runtime.table.directory import Bulk
from qrlora_deploy.runtime.table.free_rows import FreeRows
from qrlora_deploy.runtime.table.id_index import IdIndex, encode_ids
from tests.runtime.bulks import index_of
from tests.runtime.customers.test_store import ALLOWED

IDS = st.text(ALLOWED, min_size=1, max_size=MAX_ID_CHARACTERS).filter(lambda name: name[0] != ".")
# Few and short ones too, so that many are alike.
NAMES = st.one_of(st.text("ab.", min_size=1, max_size=4).filter(lambda name: name[0] != "."), IDS)
PRIMES = st.sampled_from([id_index.PRIME, 2, 7])
MANY = settings(max_examples=150, deadline=None)


@MANY
@given(
    names=st.lists(NAMES, min_size=1, max_size=60, unique=True), others=st.lists(st.text(max_size=150)), prime=PRIMES
)
def test_it_finds_what_a_dictionary_finds(names: list[str], others: list[str], prime: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(id_index, "PRIME", prime)
        patch.setattr(id_index, "CHUNK", 7)
        index = index_of(names)
        expected = {name: place for place, name in enumerate(names)}
        for name in [*names, *others, *(f"{name}x" for name in names), *(name[1:] for name in names), "é" * 3, "a\0"]:
            assert index.find(name) == expected.get(name)
    assert len(index) == len(names) and list(index.names()) == names
    assert [index.name(place) for place in range(len(names))] == names


@MANY
@given(
    left=st.lists(NAMES, min_size=1, max_size=40, unique=True),
    right=st.lists(NAMES, min_size=1, max_size=40, unique=True),
    prime=PRIMES,
)
def test_places_in_another_index(left: list[str], right: list[str], prime: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(id_index, "PRIME", prime)
        patch.setattr(id_index, "CHUNK", 7)
        found = index_of(left).places_in(index_of(right))
    assert found.tolist() == [right.index(name) if name in right else -1 for name in left]


@MANY
@given(names=st.lists(NAMES, min_size=2, max_size=30, unique=True), data=st.data(), prime=PRIMES)
def test_an_id_that_occurs_twice_is_named(names: list[str], data: st.DataObject, prime: int) -> None:
    again = data.draw(st.sampled_from(names))
    names.insert(data.draw(st.integers(0, len(names))), again)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(id_index, "PRIME", prime)
        with pytest.raises(InputError, match="occurs twice") as caught:
            index_of(names)
    assert str(caught.value) == f"the customer {again} occurs twice"


@MANY
@given(text=st.binary(min_size=1, max_size=40), cuts=st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_ids_are_checked_as_one_by_one(text: bytes, cuts: list[int]) -> None:
    parts, rest = [], text
    for cut in cuts:
        parts, rest = [*parts, rest[:cut]], rest[cut:]
    parts = [part for part in [*parts, rest] if part]
    fine = all(CUSTOMER_ID.fullmatch(part.decode("latin-1")) for part in parts) and len(set(parts)) == len(parts)
    lengths = np.array([len(part) for part in parts], dtype=np.uint8)
    if fine:
        assert list(IdIndex(lengths, b"".join(parts)).names()) == [part.decode() for part in parts]
    else:
        with pytest.raises(InputError, match="is no customer id|occurs twice"):
            IdIndex(lengths, b"".join(parts))


@pytest.mark.parametrize(
    ("lengths", "text", "message"),
    [
        ([], b"", "there are 0 customers"),
        ([1, 0], b"a", "make no sense"),
        ([129], b"a" * 129, "make no sense"),
        ([1, 2], b"ab", "make no sense"),
        ([1], b"ab", "make no sense"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths: list[int], text: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        IdIndex(np.array(lengths, dtype=np.uint8), text)


@MANY
@given(names=st.lists(NAMES, min_size=1, max_size=20))
def test_names_as_an_array_of_bytes_are_the_same(names: list[str]) -> None:
    plain, fast = encode_ids(names), encode_ids(np.array(names, dtype=np.bytes_))
    np.testing.assert_array_equal(plain[0], fast[0])
    assert plain[1] == fast[1] and plain[0].dtype == fast[0].dtype == np.uint8
    for wrong in (["../a"], ["a" * 129]):
        with pytest.raises(InputError, match="is no customer id"):
            index_of(np.array(wrong, dtype=np.bytes_))


def test_ids_that_are_counted_on_are_spread() -> None:
    """Their remainders are not: a look-up would compare with hundreds."""
    index = index_of(np.array([f"customer-{number:08d}" for number in range(50_000)], dtype=np.bytes_))
    filled = np.diff(index._starts.astype(np.int64))
    assert filled.max() < 30 and (filled**2).sum() < 4 * len(index)
    assert index.size_bytes < 45 * len(index)


@pytest.mark.parametrize("number", [25, 561, 65537, 2**32 - 5, 2**32 - 15, 2**32 - 17, 3215031749])
def test_prime_numbers_are_told_apart(number: int) -> None:
    expected = all(number % factor for factor in range(2, int(number**0.5) + 1))
    assert id_index._is_prime(number) == expected
    assert id_index._is_prime(id_index.PRIME) and 2**31 < id_index.PRIME < 2**32


@MANY
@given(steps=st.lists(st.tuples(st.sampled_from(["take", "many", "back", "undo", "grow"]), st.integers(0, 9))))
def test_free_rows_against_a_set(steps: list[tuple[str, int]]) -> None:
    free, stop = FreeRows(1, 6), 6
    expected = set(range(1, 6))
    taken: list[int] = []
    for step, number in steps:
        if step == "take" and expected:
            taken.append(free.take())
        elif step in ("many", "undo") and number <= len(expected):
            rows = free.take_many(number)
            assert rows.tolist() == sorted(expected)[:number]
            if step == "undo":
                free.give_back_many(rows)
            else:
                taken += rows.tolist()
        elif step == "back" and taken:
            free.give_back(taken.pop(number % len(taken)))
        elif step == "grow":
            stop += number
            free.add_range(stop)
        expected = set(range(1, stop)) - set(taken)
        assert sorted(free) == sorted(expected) and len(free) == len(expected)
    with pytest.raises(IndexError):
        free.take_many(len(free) + 1)


def test_a_bulk_gives_each_row_once() -> None:
    bulk = Bulk(index_of(["a", "b", "c", "d"]), np.array([7, 8, 9, 12]))
    assert bulk.row_of("c") == 9 and bulk.row_of("x") is None
    assert bulk.take_out("b") == 8 and bulk.take_out("b") is None and bulk.take_out("x") is None
    assert bulk.take_out_first() == 7 and bulk.take_out_many(np.array([1, 3])) == [12]
    assert bulk.live == 1 and list(bulk.names()) == ["c"]
    assert bulk.take_out_first() == 9 and bulk.take_out_first() is None and bulk.live == 0
