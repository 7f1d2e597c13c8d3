"""What became of every customer: one JSON line each, and which of them a resumed run need not train again."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qrlora_deploy.errors import InputError, argument, shortened
from qrlora_deploy.formats.coefficients import read_coefficients
from qrlora_deploy.io.files import atomic_file
from qrlora_deploy.training.fleet.customers import Customer, Shard
from qrlora_deploy.training.settings import fingerprint

TRAINED, SKIPPED, FAILED = "trained", "skipped", "failed"
RUN = "run_digest"
"""Key in a customer's training record: data, settings, base and basis in one digest."""

OTHER_DATA = "whose data changed"
OTHER_SETTINGS = "with other settings, base or basis"
DAMAGED = "whose file is damaged"
"""Why a customer with a file is trained again."""


@dataclass(frozen=True)
class Line:
    """What became of one customer.

    Attributes:
        customer: its id as the data have it.
        status: "trained", "skipped" (its file is there already) or "failed".
        reason: why it failed.
        file: name of its file in the output folder.
        rows: training examples.
        steps: of the optimizer.
        epochs: that ran.
        metrics: on the held-out rows.
    """

    customer: str
    status: str
    reason: str = ""
    file: str = ""
    rows: int = 0
    steps: int = 0
    epochs: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Keep the reason to one line of bounded length: names in it come from the data."""
        object.__setattr__(self, "reason", shortened(self.reason))


def summary_file(folder: Path, shard: Shard) -> Path:
    """Where the lines of a shard are written."""
    name = "summary.jsonl" if shard.count == 1 else f"summary-{shard.index}-of-{shard.count}.jsonl"
    return folder / name


def write_summary(lines: Iterable[Line], path: Path) -> None:
    """Write one JSON object a customer, in order of their ids, replacing `path` in one step."""
    ordered = sorted(lines, key=lambda line: line.customer)
    with atomic_file(path) as temporary:
        # Ids come from files and need not be text: JSON's escapes hold whatever they are.
        temporary.write_text("".join(f"{json.dumps(asdict(line))}\n" for line in ordered), encoding="ascii")


def run_digest(customer: Customer, origin: dict[str, str]) -> str:
    """What two runs must have in common for one customer to come out the same.

    Args:
        customer: the customer; the device of its settings may differ.
        origin: digests of the base and the basis.
    """
    held_out = customer.evaluation.digest if customer.evaluation else None
    marks = fingerprint(customer.settings, data_digest=customer.train.digest, evaluation_digest=held_out, **origin)
    return hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()


def finished_line(customer: Customer, path: Path, wanted: str) -> Line | str:
    """The line of a customer whose file is whole and comes from the same data and settings; else why it is none.

    Args:
        customer: the customer.
        path: its file.
        wanted: what `run_digest` gives.
    """
    if not path.is_file():
        return ""
    try:
        record = read_coefficients(path).training
    except InputError:
        return DAMAGED  # cut, of another kind: it is trained again, and its file replaced when that is done
    if record.get(RUN) == wanted:
        return trained_line(customer.name, path, record, SKIPPED)
    held_out = customer.evaluation.digest if customer.evaluation else None
    same = record.get("data_digest") == customer.train.digest and record.get("evaluation_digest") == held_out
    return OTHER_SETTINGS if same else OTHER_DATA


def resumed_text(kept: int, again: Mapping[str, int], new: int) -> str:
    """What a resumed run makes of the customers, in one line.

    Args:
        kept: customers whose file stays.
        again: customers that are trained again, by the reason.
        new: customers without a file.
    """
    reasons = ", ".join(f"{count} {reason}" for reason, count in again.items())
    more = f" ({reasons})" if again else ""
    return f"{argument('resume', True)}: {kept} kept, {sum(again.values())} trained again{more}, {new} new"


def trained_line(name: str, path: Path, record: dict[str, Any], status: str = TRAINED) -> Line:
    """The line of a customer with a file.

    Args:
        name: its id.
        path: its file.
        record: its training record.
        status: "trained" or "skipped".
    """
    numbers = {key: record[key] for key in ("rows", "steps", "epochs", "metrics")}
    return Line(name, status, file=path.name, **numbers)
