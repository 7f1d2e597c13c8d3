"""Names of outputs: of a new head, and which output a label of data means."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from qrlora_deploy.data.labels import Label, canonical
from qrlora_deploy.data.lines import row_of
from qrlora_deploy.errors import InputError, argument

if TYPE_CHECKING:
    from qrlora_deploy.data.examples import Examples

TASK_FIELD = "qrlora_task"
"""Entry of `config.json` for tasks that transformers has no `problem_type` for; transformers keeps it as it is."""

AUTO_MODEL = "AutoModel"

IGNORED = -100
"""The target of a token that has none: padding, special tokens and all but the first one of a word."""


def label_names(labels: Iterable[str]) -> tuple[str, ...]:
    """The classes in the order of a new head: whole numbers by value, names by the alphabet."""
    names = set(labels)
    if all(name.isdecimal() for name in names):
        # By value, and without making a number of thousands of digits.
        return tuple(sorted(names, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name)))
    return tuple(sorted(names))


def label_index(names: Sequence[str]) -> dict[str, int]:
    """The output that each label of data means.

    `LABEL_0`, `LABEL_1` and so on, which transformers gives to outputs without names, are also meant by their
    numbers alone, where all names are of that kind. So is a name by another spelling of the same: 1.0 for 1.
    """
    index = {name: position for position, name in enumerate(names)}
    if all(name == f"LABEL_{position}" for name, position in index.items()):
        index |= {str(position): position for position in range(len(names))}
    return {canonical(name): position for name, position in reversed(index.items())} | index


def output_of(index: Mapping[str, int], label: str) -> int | None:
    """The output that a label of data means, by an index from `label_index`; None where it means none."""
    return index.get(label, index.get(canonical(label)))


def first_row(examples: "Examples", wanted: Container[Label]) -> str:
    """The first row with one of the labels `wanted`, as a message begins."""
    row, label = next((row, label) for row, label in enumerate(examples.labels, start=1) if label in wanted)
    return f"{row_of(examples.name, row)} has the label {label!r}"


def check_pairs(examples: "Examples", option: str) -> None:
    """Make sure that the rows are pairs of texts.

    Raises:
        InputError: they are single texts.
    """
    if examples.pairs is None:
        raise InputError(
            f"{examples.name} holds single texts; {argument('task', option)} needs pairs: "
            f"two columns such as text and text_pair, or name them by {argument('text_column', 'FIRST,SECOND')}"
        )
