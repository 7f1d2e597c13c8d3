"""The option `--head-labels`, which exporters of switchable graphs and of what belongs to them share."""

from typing import Any

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.exporting.options import option

MAX_HEAD_LABELS = 2**20
"""A customer with more labels has another task; each label takes a row of the output layer in every row of a table."""


def head_labels_option(help: str) -> Any:
    """The field of an exporter's options; 0: customers have no heads of their own."""
    return option(0, help, least=1, most=MAX_HEAD_LABELS)


def check_head_labels(labels: int) -> None:
    """Refuse a table that no memory holds.

    Raises:
        InputError: naming the option.
    """
    if not 0 <= labels <= MAX_HEAD_LABELS:
        raise InputError(f"{argument('head_labels')} must be between 0 and {MAX_HEAD_LABELS}, not {labels}")
