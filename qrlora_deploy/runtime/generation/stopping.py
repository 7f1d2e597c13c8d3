"""Stop strings: an answer ends where one of them would begin, wherever the tokens' borders are."""

from collections.abc import Sequence

from qrlora_deploy.errors import InputError, argument

MOST_STOPS = 16
MOST_CHARACTERS = 1024


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """The stop strings as a tuple.

    Raises:
        InputError: they are one text, too many, or one is empty, too long or no text.
    """
    if isinstance(stops, (str, bytes)) or not isinstance(stops, Sequence):
        raise InputError(f"{argument('stop')} must be a list of texts; put one text into a list")
    if len(stops) > MOST_STOPS:
        raise InputError(f"{argument('stop')} may have {MOST_STOPS} texts at most, not {len(stops)}")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MOST_CHARACTERS:
            raise InputError(
                f"{argument('stop')} must hold texts of 1 to {MOST_CHARACTERS} characters, not {stop!r:.30}"
            )
    return tuple(dict.fromkeys(stops))


class StopStrings:
    """Lets the text of one answer through up to the first stop string.

    What may be the beginning of one is held back. How the text is cut into pieces changes nothing: the stop string
    counts that is complete first, and of those that end at the same place the longest.

    Args:
        stops: checked by `check_stops`.

    Attributes:
        found: the stop string that ended the answer; None so far.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def feed(self, piece: str) -> str:
        """What of the text may be shown now that `piece` has come; nothing more once a stop string was found."""
        if self.found is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        ends = [(place + len(stop), place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        shown = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[shown:]
        return text[:shown]

    def end(self) -> str:
        """What was held back, for an answer that ended otherwise."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` begin `stop`, at most."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
