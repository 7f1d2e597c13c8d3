"""Which place has a key: the same everywhere, evenly, and moved as little as can be."""

import os
import subprocess
import sys
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from qrlora_deploy.serving.ray.rendezvous import ranked

PLACES = st.sets(st.text(max_size=12), min_size=1, max_size=8)


@given(st.text(max_size=40), PLACES)
def test_all_places_in_an_order_that_does_not_depend_on_theirs(key: str, places: set[str]) -> None:
    found = ranked(key, sorted(places))
    assert sorted(found) == sorted(places)
    assert ranked(key, sorted(places, reverse=True)) == found


@given(st.text(max_size=40), PLACES, st.text(max_size=12))
def test_a_place_that_comes_or_goes_moves_nobody_else(key: str, places: set[str], other: str) -> None:
    with_it, without = ranked(key, places | {other}), ranked(key, places - {other})
    assert [place for place in with_it if place != other] == without


def test_other_processes_agree() -> None:
    script = "from qrlora_deploy.serving.ray.rendezvous import ranked; print(*ranked('acme', 'abcdefgh'))"
    lines = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[0]
        for seed in ("1", "2")
    }
    assert lines == {ranked("acme", "abcdefgh")[0]}


def test_the_order_of_a_release_is_that_of_the_next() -> None:
    # Fronts of two releases run side by side during an upgrade, and must send a customer to one place.
    assert ["".join(ranked(key, "abcde")) for key in ("acme", "bolt", "", "ä" * 40)] == [
        "ecbda",
        "aecdb",
        "dabce",
        "dcabe",
    ]


def test_customers_are_spread_evenly() -> None:
    keys, places = [f"customer-{number}" for number in range(10_000)], [f"replica-{number}" for number in range(5)]
    first = Counter(ranked(key, places)[0] for key in keys)
    # Five standard deviations of a binomial distribution of 10,000 with one in five: 200.
    assert set(first) == set(places) and all(abs(count - 2000) < 200 for count in first.values())
    # Who loses its place is spread evenly over the others, too.
    second = Counter(ranked(key, places)[1] for key in keys if ranked(key, places)[0] == places[0])
    assert len(second) == 4 and max(second.values()) < 1.4 * min(second.values())
