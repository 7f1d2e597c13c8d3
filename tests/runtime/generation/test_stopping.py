"""Stop strings: against a search in the whole text, however the text is cut into pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora_deploy.errors import InputError
from qrlora_deploy.runtime.generation.stopping import StopStrings, check_stops

LETTERS = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def whole(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What is shown of a text, letter by letter: the first end of a stop string counts, the longest one there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(deadline=None, max_examples=500)
@given(LETTERS, STOPS, st.data())
def test_any_cut_gives_what_the_whole_text_gives(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    expected, found = whole(text, stops)
    watched, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += watched.feed(piece)
        # Nothing leaks: what was shown is the beginning of what will have been shown.
        assert expected.startswith(shown)
    assert shown + watched.end() == expected
    assert watched.found == found


@settings(deadline=None, max_examples=200)
@given(LETTERS, STOPS)
def test_no_more_is_held_back_than_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    watched = StopStrings(stops)
    shown = "".join(watched.feed(letter) for letter in text)
    if watched.found is None:
        held = text[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_nothing_comes_after_a_stop_string() -> None:
    watched = StopStrings(["END"])
    assert [watched.feed(piece) for piece in ("a E", "N", "D b", "c")] == ["a ", "", "", ""]
    assert watched.end() == "" and watched.found == "END"


@pytest.mark.parametrize("stops", ["END", [""], ["a" * 1025], ["a"] * 17, [3], 5])
def test_bad_stop_strings_are_refused(stops: object) -> None:
    with pytest.raises(InputError, match="^stop m"):
        check_stops(stops)  # type: ignore[arg-type]
