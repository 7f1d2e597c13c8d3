"""Which customers a fleet trains: rows grouped by customer, shards, and what is refused before training."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qrlora_deploy.data.examples import Examples, check_alike
from qrlora_deploy.data.labels import WHOLE
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import CUSTOMER_ID
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.tasks.registry import BY_OPTION
from qrlora_deploy.training.fleet.grouping import Groups, read_groups
from qrlora_deploy.training.outputs import (
    Outputs,
    base_outputs,
    customer_outputs,
    encode_rows,
    frozen_outputs,
    taken_for,
)
from qrlora_deploy.training.settings import TrainSettings

Targets = Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True)
class Shard:
    """One worker's part of a fleet: the customers whose id falls to `index` of `count`.

    Raises:
        InputError: there is no such part.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(
                f"{argument('shard')} {self.index}/{self.count}: give part I of N with I from 0 to N - 1, such as 0/4"
            )

    def holds(self, name: str) -> bool:
        """Whether a customer belongs here; the same on every machine, whoever else is in the data."""
        # surrogatepass: a name that is no text belongs to one shard too, which reports it.
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8]) % self.count == self.index


@dataclass(frozen=True)
class FleetSource:
    """Where the rows of all customers are.

    Attributes:
        data: a file with a column of customer ids, or a folder: of files with that column, or,
            without a column, of one file a customer, named by its id.
        evaluation: the same for held-out rows, or None.
        customer_column: name of the column of ids; None for a folder with a file a customer.
        text_column: as in `read_examples`.
        label_column: as in `read_examples`.
    """

    data: Path
    evaluation: Path | None = None
    customer_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None


@dataclass(frozen=True)
class Customer:
    """One customer of a fleet, whose data were found to be in order.

    Attributes:
        name: its id, which names its file.
        train: its examples.
        evaluation: its held-out examples, or None.
        outputs: what its head answers.
        targets: of `train`, as `encode_labels` gives them.
        evaluation_targets: of `evaluation`; empty where there is none.
        settings: how it is trained, with a learning rate of its own: the default depends on its rows.
    """

    name: str
    train: Examples
    evaluation: Examples | None
    outputs: Outputs
    targets: Targets
    evaluation_targets: Targets
    settings: TrainSettings


@dataclass(frozen=True)
class FleetCustomers:
    """The customers of a shard.

    Attributes:
        customers: in order of their ids.
        refused: reason by id, for customers that cannot be trained.
        strangers: how many customers have held-out rows alone; nothing is done with those.
    """

    customers: list[Customer]
    refused: dict[str, str] = field(default_factory=dict)
    strangers: int = 0


def choose_customers(
    source: FleetSource, checkpoint: Checkpoint, settings: TrainSettings, shard: Shard, basis: Basis | None = None
) -> FleetCustomers:
    """Read the data and sort the customers into those that can be trained and those that cannot.

    Args:
        source: the data.
        checkpoint: the base, with its task head.
        settings: of all customers.
        shard: whose customers are kept.
        basis: whose coefficients they have, on which the default learning rate depends; None: it is left open.

    Raises:
        InputError: a file or folder as a whole cannot be read, or the base has no usable head; what
            is wrong with one customer alone is in the answer instead.
    """
    frozen = settings.head == "frozen"
    checkpoint = taken_for(checkpoint, settings.task)
    if not settings.labelled and not settings.written:
        raise InputError(f"a fleet trains no {BY_OPTION[settings.task].name}; train these customers by `train`")
    base = frozen_outputs(checkpoint, settings.task) if frozen else base_outputs(checkpoint)
    if base.task.writes_text and not frozen:
        raise InputError(f"a {base.task.name} keeps the head of its decoder; no {argument('head', settings.head)}")
    if frozen:
        settings.metric_of(base.task)
        settings.check_tuning(base.task, source.evaluation is not None)
    written = base.task.writes_text
    groups = _read(source, source.data, shard, written)
    held_out = _read(source, source.evaluation, shard, written) if source.evaluation else Groups()
    refused = {
        name: f"{_bad_id(name)}; {reason}" if _bad_id(name) else reason for name, reason in groups.refused.items()
    }
    customers = []
    for name in sorted(groups.examples):
        try:
            evaluation = held_out.examples.get(name)
            reason = _bad_id(name) or held_out.refused.get(name)
            if reason:
                raise InputError(reason)
            outputs = (
                base if frozen else customer_outputs(checkpoint, groups.examples[name], settings.head, settings.task)
            )
            settings.metric_of(outputs.task)
            rows = groups.examples[name]
            own = settings.resolved(basis, outputs.task.rate_factor, len(rows)) if basis else settings
            customers.append(_customer(name, own, rows, evaluation, outputs))
        except InputError as error:
            refused[name] = str(error)
    if not frozen and settings.task == "auto":
        unclear = _unclear(customers)
        customers = [customer for customer in customers if customer.name not in unclear]
        refused |= unclear
    strangers = (held_out.examples.keys() | held_out.refused.keys()) - groups.examples.keys() - groups.refused.keys()
    return FleetCustomers(customers, refused, len(strangers))


def _read(source: FleetSource, place: Path, shard: Shard, written: bool) -> Groups:
    return read_groups(place, source.customer_column, source.text_column, source.label_column, shard.holds, written)


def _unclear(customers: list[Customer]) -> dict[str, str]:
    """By name, why customers of whole numbers may be meant otherwise: others in the same data have fractions."""
    fractions = [customer.name for customer in customers if customer.outputs.new and customer.outputs.task.is_number]
    if not fractions:
        return {}
    reason = f"its labels are whole numbers, those of {fractions[0]} fractions; say what they are by {argument('task')}"
    return {
        customer.name: reason
        for customer in customers
        if customer.outputs.new
        and not customer.outputs.task.is_number
        and all(isinstance(label, str) and WHOLE.fullmatch(label) for label in customer.train.labels)
    }


def _bad_id(name: str) -> str | None:
    if CUSTOMER_ID.fullmatch(name):
        return None
    if not name:
        return "these rows have no customer id"
    return "no customer id: 1 to 128 of A-Z a-z 0-9 . _ - are allowed, and no dot at the start"


def _customer(
    name: str, settings: TrainSettings, train: Examples, evaluation: Examples | None, outputs: Outputs
) -> Customer:
    check_alike(train, evaluation)
    if not outputs.task.trains_in_fleets:
        raise InputError(f"a fleet trains no {outputs.task.name}; train this customer by `train`")
    targets = encode_rows(outputs, train, evaluation, settings.head == "frozen")
    return Customer(name, train, evaluation, outputs, *targets, settings)
