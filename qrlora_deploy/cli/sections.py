"""A command of many options, shown in parts."""

from collections.abc import Mapping, Sequence
from typing import Any

import click


class SectionedCommand(click.Command):
    """A command whose help has its options in sections.

    Args:
        sections: titles by the name of the first parameter of each section, in the order of the options.
    """

    def __init__(self, *args: Any, sections: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each section under its title; what comes before the first one is under "Options"."""
        title, part = "Options", list[click.Parameter]()
        for parameter in self.get_params(ctx):
            if parameter.name in self.sections:
                write_section(formatter, title, part, ctx)
                title, part = self.sections[parameter.name], []
            part.append(parameter)
        write_section(formatter, title, part, ctx)


def write_section(
    formatter: click.HelpFormatter, title: str, options: Sequence[click.Parameter], ctx: click.Context
) -> None:
    """A title and its options; nothing where there are none. Arguments are in the line of the usage."""
    shown = [option.get_help_record(ctx) for option in options if isinstance(option, click.Option)]
    records = [record for record in shown if record is not None]
    if records:
        with formatter.section(title):
            formatter.write_dl(records)
