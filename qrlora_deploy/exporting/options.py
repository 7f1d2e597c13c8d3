"""Options of exporters: fields of a dataclass of each exporter's own, which the command line reads too."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qrlora_deploy.errors import InputError, argument

if TYPE_CHECKING:
    from qrlora_deploy.exporting.exporter import Exporter

RESERVED = frozenset(
    {
        "base",
        "basis",
        "coefficients",
        "output",
        "merge",
        "format",
        "text_column",
        "label_column",
        "json",
        "debug",
        "help",
    }
)
"""Names of options that `export` has for every exporter."""


@dataclass(frozen=True)
class OptionFacts:
    """What the command line must know of an option.

    Attributes:
        help: one or two sentences.
        default: what it is where it is not given.
        kind: of the value: bool (a flag), int, float, str or Path.
        choices: the values it may have; empty: any.
        least: the smallest number; None: any.
        most: the largest number; None: any.
        reads: what the file or data set that is named on the command line is read as; None: the value itself is meant.
            "examples" gives labelled `Examples`, "texts" gives `TextRows`.
    """

    help: str
    default: Any = None
    kind: type = str
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    reads: Literal["examples", "texts"] | None = None


def option(default: Any, help: str, **facts: Any) -> Any:
    """A field of an exporter's options; `padding_free` becomes `--padding-free`.

    Args:
        default: of the field, and of the option.
        help: one or two sentences for `export --help`.
        facts: other fields of `OptionFacts`; the kind of the value is that of `default` where it is not given.
    """
    kind = str if default is None else type(default)
    known = OptionFacts(help, default, **{"kind": kind} | facts)
    return dataclasses.field(default=default, metadata={"option": known})


def facts_of(options: type[Any]) -> dict[str, OptionFacts]:
    """What is known of each option of a dataclass, by the name of its field."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(options)}


def make_options(exporter: "Exporter", given: Mapping[str, Any], others: Iterable["Exporter"] = ()) -> Any:
    """An exporter's options from those that were given; the rest have their defaults.

    Args:
        exporter: whose options they are.
        given: values by the name of the field.
        others: exporters that may know an option which this one does not.

    Raises:
        InputError: the exporter has no such option, with the exporters that have it; or a value is wrong.
    """
    for name in given:
        if name not in facts_of(exporter.options):
            having = [argument("format", other.name) for other in others if name in facts_of(other.options)]
            raise InputError(
                f"{argument(name)} is no option of {argument('format', exporter.name)}; "
                + (f"it belongs to {' and '.join(having)}" if having else "no exporter has it")
            )
        _check(name, given[name], facts_of(exporter.options)[name])
    return exporter.options(**given)


def _check(name: str, value: Any, facts: OptionFacts) -> None:
    """Hold a caller's value against what the command line holds it against, by an InputError; a default is not."""
    if value == facts.default and type(value) is type(facts.default):
        return
    if facts.choices and value not in facts.choices:
        raise InputError(f"unknown {argument(name)} {value!r:.40}; choose from {', '.join(facts.choices)}")
    if facts.kind not in (int, float) or (facts.least is None and facts.most is None):
        return
    if isinstance(value, bool) or not isinstance(value, (int, facts.kind)):
        raise InputError(f"{argument(name)} must be a number, not {value!r:.40}")
    low, high = facts.least, facts.most
    if (low is not None and value < low) or (high is not None and value > high):
        limits = " and ".join([f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None))
        raise InputError(f"{argument(name)} must be {limits}, not {value}")
