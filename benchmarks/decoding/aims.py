"""What was aimed at and what was found, from a record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.decoding.names import COMPILED, EAGER_FP32, FEW, MANY, PEFT, resident

LARGE, SMALL = "llama-3.2-1b", "smollm2-135m"


@dataclass(frozen=True)
class Line:
    """A figure with its aim.

    Attributes:
        value: None: it was not measured.
        aim: a bound.
        at_most: whether smaller is better.
    """

    what: str
    value: float | None
    aim: float
    at_most: bool

    @property
    def met(self) -> bool:
        """Whether the aim is reached."""
        return self.value is not None and (self.value <= self.aim if self.at_most else self.value >= self.aim)


def lines_of(record: Mapping[str, Any]) -> list[Line]:
    """Every figure of the issue that a record may hold."""
    large, small = (Figures(record, name) for name in (LARGE, SMALL))
    return [
        Line("1B, no branches, by the bandwidth floor, batch 1", large.by_floor(1), 1.40, True),
        Line("1B, q and v, us a layer over none, batch 1", large.layer_us("qv", 1), 6, True),
        Line("1B, all linear, us a layer over none, batch 1", large.layer_us("all", 1), 25, True),
        Line("135M, q and v, us a layer over none, batch 8", small.layer_us("qv", 8), 5.5, True),
        Line("135M, all linear, us a layer over none, batch 8", small.layer_us("all", 8), 21, True),
        Line("torch.compile by q and v, 1B, batch 1", large.ratio(1, COMPILED, "qv"), 1.35, False),
        Line("torch.compile by q and v, 1B, batch 64", large.ratio(64, COMPILED, "qv"), 1.8, False),
        Line("PEFT's batch by q and v, 1B", large.part_ratio("peft", PEFT, "qv"), 250, False),
        Line("continuous by static batches", batching_gain(record), 1.8, False),
        Line("10,000 customers by 10", large.part_ratio("resident", resident(MANY), resident(FEW)), 1.01, True),
        Line("one CPU thread: eager fp32 by int4, q and v", thread_ratio(record, "int4, qv"), 8, False),
        Line("one CPU thread: eager fp32 by int4, all linear", thread_ratio(record, "int4, all"), 8, False),
    ]


class Figures:
    """Of one shape of a record."""

    def __init__(self, record: Mapping[str, Any], name: str) -> None:
        self._shape: Mapping[str, Any] = record.get("shapes", {}).get(name, {})

    def token_ms(self, rows: int, contender: str) -> float | None:
        """The median of a contender."""
        return _token_ms(self._shape.get("steps", {}).get(str(rows), {}), contender)

    def by_floor(self, rows: int) -> float | None:
        """The plain graph by the time in which all weights are read once."""
        found = self.token_ms(rows, "none")
        return None if found is None else found / self._shape["floor_ms"]

    def layer_us(self, graph: str, rows: int) -> float | None:
        """Microseconds a layer that branches take."""
        plain, own = self.token_ms(rows, "none"), self.token_ms(rows, graph)
        return None if plain is None or own is None else (own - plain) * 1e3 / self._shape["layers"]

    def ratio(self, rows: int, above: str, below: str) -> float | None:
        """Of two contenders of a batch."""
        return _ratio(self.token_ms(rows, above), self.token_ms(rows, below))

    def part_ratio(self, part: str, above: str, below: str) -> float | None:
        """Of two contenders of another part."""
        found = self._shape.get(part, {})
        return _ratio(_token_ms(found, above), _token_ms(found, below))


def batching_gain(record: Mapping[str, Any]) -> float | None:
    """Seconds of static batches by those of continuous ones."""
    seconds = record.get("batching", {}).get("seconds")
    return None if not seconds else _ratio(seconds["static"]["p50"], seconds["continuous"]["p50"])


def thread_ratio(record: Mapping[str, Any], label: str) -> float | None:
    """Eager fp32 by a graph on one thread."""
    found = record.get("one_thread", {})
    return _ratio(_token_ms(found, EAGER_FP32), _token_ms(found, label))


def table(lines: Sequence[Line]) -> str:
    """As Markdown, what was not measured left out."""
    rows = ["| | found | aim |", "| --- | --- | --- |"]
    for line in lines:
        if line.value is not None:
            found = f"{line.value:.3g}" if line.met else f"**{line.value:.3g}**"
            rows.append(f"| {line.what} | {found} | {'≤' if line.at_most else '≥'} {line.aim} |")
    return "\n".join(rows)


def _token_ms(results: Mapping[str, Any], contender: str) -> float | None:
    found = results.get("contenders", {}).get(contender)
    return None if found is None else float(found["token_ms"]["p50"])


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below
