"""The records as Markdown: what was aimed at and found, misses with their reasons, and the other figures."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu import aims, figures
from benchmarks.gpu.aims import Bar
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.parts import Part
from benchmarks.gpu.running import Ledger

TRIAL = "A trial with tiny shapes: it shows that everything runs, and none of its numbers means anything."


@dataclass(frozen=True)
class Machine:
    """Where a record was made."""

    device: str
    date: str
    versions: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions)
        return f"{self.device}, {self.date} ({versions})"


SHOWN = ("torch", "transformers", "onnxruntime-gpu", "peft")


def machine_of(record: dict[str, Any]) -> Machine:
    """From any of the records: those of `bench` name all GPUs, those of fleets have no part of its own."""
    found = record.get("environment", record)
    gpus = ", ".join(gpu["name"] for gpu in found.get("gpus", ()))
    device = found.get("device") or gpus or "cpu"
    versions = found.get("versions", {})
    return Machine(device, found["date"][:10], tuple((name, versions[name]) for name in SHOWN if name in versions))


def render(parts: Iterable[Part], ledger: Ledger, quick: bool) -> str:
    """The tables of all parts; a part without a record has a line that says so.

    Raises:
        InputError: a record is not JSON.
    """
    tables = Tables()
    for part in parts:
        outcome, records = ledger.outcome(part), ledger.records(part)
        if len(records) < len(part.records):
            reason = f"failed: {outcome.reason}" if outcome is not None and outcome.reason else "it was not run yet"
            tables.aimed.append(_not_measured(part, reason))
            continue
        if outcome is not None and outcome.reason:
            tables.notes.append(f"{part.name} failed: {outcome.reason}")
        try:
            tables.add(part, records)
        except (KeyError, TypeError, IndexError) as error:
            # One record of another version must not cost the table of all others.
            tables.aimed.append(_not_measured(part, f"its record has another form: {type(error).__name__} {error}"))
    head = [TRIAL, ""] if quick else []
    head += [f"- {machine}: {', '.join(names)}" for machine, names in tables.machines.items()]
    notes = [f"- {_cell(note)}" for note in tables.notes]
    blocks = (head, _bar_lines(tables.aimed), _figure_lines(tables.others), notes)
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


@dataclass
class Tables:
    """What the records gave so far.

    Attributes:
        aimed: lines with an aim. others: lines without.
        notes: failures, and graphs that were left out.
        machines: parts by where their records were made.
    """

    aimed: list[Bar] = field(default_factory=list)
    others: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machines: dict[Machine, list[str]] = field(default_factory=dict)

    def add(self, part: Part, records: dict[str, Any]) -> None:
        """All that the records of a part say, or nothing.

        Raises:
            KeyError, TypeError, IndexError: a record has another form.
        """
        machine = machine_of(next(iter(records.values())))
        aimed: list[Bar] = []
        others: list[Figure] = []
        for record in records.values():
            aimed += aims.READERS[part.kind](record) if part.kind in aims.READERS else ()
            others += figures.READERS[part.kind](record)
        self.aimed += aimed
        self.others += others
        self.notes += [f"{part.name}, left out: {line}" for line in _left_out(part, records)]
        self.machines.setdefault(machine, []).append(part.name)


def _not_measured(part: Part, reason: str) -> Bar:
    return Bar(f"{part.name}: {part.title}", None, "not measured", "", None, reason)


def _left_out(part: Part, records: dict[str, Any]) -> list[str]:
    """Graphs that the benchmark tries and that did not run or were wrong; those of the product are failures."""
    return [
        f"{batch['batch']} × {batch['length']} {name}: {reason}"
        for record in records.values()
        for batch in (record.get("batches", ()) if part.needs else ())
        for name, reason in batch.get("failed", {}).items()
        if name not in part.needs
    ]


def _bar_lines(found: list[Bar]) -> list[str]:
    words = {True: "yes", False: "**no**", None: "-"}
    lines = ["| | found | aim | met |", "| --- | --- | --- | --- |"]
    for bar in found:
        met = f"{words[bar.met]}: {bar.why}" if bar.why else words[bar.met]
        lines.append(f"| {' | '.join(_cell(text) for text in (bar.what, bar.found, bar.aim, met))} |")
    return lines


def _figure_lines(found: list[Figure]) -> list[str]:
    if not found:
        return []
    return [
        "| also measured | |",
        "| --- | --- |",
        *(f"| {_cell(what)} | {_cell(value)} |" for what, value in found),
    ]


def _cell(text: str) -> str:
    """On one line, without what ends a cell."""
    return " ".join(text.split()).replace("|", "\\|")
