"""From what a user asks of an export to the exporter's own options, for the command line and the Python API alike."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.exporting.options import facts_of, make_options
from qrlora_deploy.exporting.registry import all_exporters

if TYPE_CHECKING:
    from qrlora_deploy.exporting.exporter import Exporter


def choose_options(
    exporter: "Exporter", given: Mapping[str, Any], text_column: str | None = None, label_column: str | None = None
) -> Any:
    """An exporter's options; where one is read from data, a name of a file or data set is read.

    Args:
        exporter: whose options they are.
        given: values by the name of the field; what is not given has its default.
        text_column: of the data; None: it is found.
        label_column: of the data; None: it is found.

    Raises:
        InputError: the exporter has no such option, with those that have it; a value or file is wrong; or columns are
            named and no data is.
    """
    reading = [name for name, facts in facts_of(exporter.options).items() if facts.reads]
    if (text_column or label_column) and not given.keys() & set(reading):
        which = " or ".join(map(argument, reading)) or f"data, and {argument('format', exporter.name)} reads none"
        raise InputError(
            f"{argument('text_column')} and {argument('label_column')} name columns of {which}; "
            "give that, or leave them out"
        )
    values = {name: _read(exporter, name, value, text_column, label_column) for name, value in given.items()}
    return make_options(exporter, values, all_exporters())


def _read(exporter: "Exporter", name: str, value: Any, text_column: str | None, label_column: str | None) -> Any:
    facts = facts_of(exporter.options).get(name)
    if facts is None or facts.reads is None or not isinstance(value, (str, os.PathLike)):
        return value
    from qrlora_deploy.data.examples import read_examples, read_texts

    place = os.fspath(value)
    if facts.reads == "texts":
        return read_texts(place, text_column)
    return read_examples(place, text_column, label_column, labelled=False)


def check_customer(exporter: "Exporter", given: bool) -> None:
    """Refuse a customer where none is taken, and the lack of one where it is needed.

    Raises:
        InputError: saying which.
    """
    if exporter.needs_customer and not given:
        raise InputError(
            f"{argument('format', exporter.name)} writes one customer; give it by {argument('coefficients')}"
        )
    if exporter.needs_customer is False and given:
        raise InputError(
            f"{argument('format', exporter.name)} writes a form for all customers; leave {argument('coefficients')} out"
        )


def check_output(exporter: "Exporter", output: Any) -> None:
    """Refuse a place that cannot be written, before long work starts; which file it may replace the exporter knows.

    Raises:
        InputError: saying why.
    """
    from qrlora_deploy.io.outputs import check_free_file, check_free_folder

    check = check_free_folder if exporter.output == "folder" else check_free_file
    check(output)
