"""What a label is: its value in a file as text, and what counts as a number."""

import math
import re
from collections.abc import Iterable, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any

from qrlora_deploy.data.lines import place_of, row_of
from qrlora_deploy.errors import InputError, shortened

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
"""What people write as a number. Python's own reader takes `1_1` for eleven, and digits of other scripts."""

WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
WHOLE_WITH_POINT = re.compile(r"([+-]?\d+)\.0*", re.ASCII)
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)

NO_NUMBER = {"nan", "na", "n/a", "<na>", "none", "null", "nil", "inf", "infinity", "?", ".", ""}
"""What stands in a column of numbers where there is none, in lower case and without a sign: a lone `-` is empty."""

SHOWN = 5

Label = str | tuple[str, ...]
"""The label of a row as it was read: one, or a list of any number, which may be empty."""


def column_labels(source: str, name: str, values: Sequence[Any]) -> list[Label]:
    """The labels of a column as text, lists of them as tuples.

    Args:
        source: what errors name.
        name: the column's.
        values: as a reader gave them.

    Raises:
        InputError: a row has no label (a NaN is none), or one that is no single value; saying which.
    """
    _check_not_one_hot(source, values)
    labels: list[Label] = []
    missing = []
    for row, value in enumerate(settled(values), start=1):
        try:
            label = label_of(value)
        except InputError as error:
            raise InputError(f"{row_of(source, row)}: the label is {error}") from error
        labels.append(label)
        if label == "":
            missing.append(row)
    if missing:
        verb = "has" if len(missing) == 1 else "have"
        place = place_of(source, missing[0])
        raise InputError(f"{place}: {rows_text(missing)} {verb} no {name}; every example needs one")
    return labels


def _check_not_one_hot(source: str, values: Sequence[Any]) -> None:
    """Refuse, by an InputError, lists with a 0 or a 1 for every label: read as names, all rows would have both."""
    lists = [value for value in values if isinstance(value, list)]
    lengths = {len(value) for value in lists}
    if len(lengths) == 1 and lengths != {0} and all(element in (0, 1) for value in lists for element in value):
        row = next(row for row, value in enumerate(values, start=1) if isinstance(value, list))
        raise InputError(
            f"{row_of(source, row)}: the label is a list, {shortened(repr(lists[0]), 80)}, as all lists "
            f"are of 0 and 1; give the names of the labels that apply"
        )


def settled(values: Sequence[Any]) -> Sequence[Any]:
    """The values of a column, with 1.0 as 1 where whole numbers stand beside it.

    Programs that write JSON turn a column of whole numbers into floats where a row of it was missing, and files
    that were put together hold both. A column of floats alone stays one.
    """
    floats = [value for value in values if type(value) is float]
    if not floats or not any(type(value) is int for value in values):
        return values
    if not all(math.isnan(value) or value.is_integer() for value in floats):
        return values
    return [int(value) if type(value) is float and not math.isnan(value) else value for value in values]


def rows_text(rows: Sequence[int]) -> str:
    """`row 3`, or `rows 3, 5 and 2 more`."""
    shown = ", ".join(str(row) for row in rows[:SHOWN])
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {shown}{more}"


def number_of(label: str) -> float | None:
    """The finite number that a label is, or None."""
    value = float(label) if NUMBER.fullmatch(label) else math.inf
    return value if math.isfinite(value) else None


def is_fraction(label: str) -> bool:
    """Whether a number is written with a decimal point, or as small as only fractions are."""
    return "." in label or "e-" in label.lower()


def stands_for_no_number(label: str) -> bool:
    """Whether a label is what programs write where a number is missing or infinite."""
    infinite = NUMBER.fullmatch(label) is not None and number_of(label) is None
    return infinite or label.lower().lstrip("+-") in NO_NUMBER


def canonical(label: str) -> str:
    """One spelling of what several programs write differently: `1.0` is 1, `True` is true."""
    if label in ("True", "False", "TRUE", "FALSE"):
        return label.lower()
    whole = WHOLE_WITH_POINT.fullmatch(label)
    return whole[1] if whole else label


def quoted(names: Iterable[str], most: int = 8) -> str:
    """Names in quotation marks, which show blanks; a long list is cut."""
    several = list(names)
    shown = ", ".join(repr(name) for name in several[:most])
    return shown + (f" and {len(several) - most} more" if len(several) > most else "")


def is_unicode(text: str) -> bool:
    """Whether a text is more than half a surrogate pair somewhere, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def label_of(value: Any) -> Label:
    """A value as a label: a text, empty where there is none, or the texts of a list.

    Raises:
        InputError: it is neither; says what it is instead.
    """
    if not isinstance(value, list):
        return text_of(value)
    names = tuple(text_of(element) for element in value)
    if "" in names:
        raise InputError(f"a list with an empty name: {shortened(repr(value), 80)}")
    if len(set(names)) < len(names):
        raise InputError(f"a list that names a label twice: {shortened(repr(value), 80)}")
    return names


def text_of(value: Any) -> str:
    """A value as a label; empty where there is none.

    Raises:
        InputError: it is no single value; says what it is instead.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if not is_unicode(value):
            raise InputError(f"not valid Unicode: {value!a}")
        return value.strip()
    if isinstance(value, float) and math.isinf(value):
        raise InputError(f"{value}, which is no finite number")
    if isinstance(value, int | float | Decimal | date | time):
        return str(value)
    kind = {"list": "a list", "dict": "an object"}.get(type(value).__name__, type(value).__name__)
    raise InputError(f"{kind}, {shortened(repr(value), 80)}; a label is a name, a number or a list of names")
