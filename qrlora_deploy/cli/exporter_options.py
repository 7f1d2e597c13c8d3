"""Options of exporters as options of the command line: one declaration, the dataclass of each exporter."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrlora_deploy.cli.options import ANY_PATH
from qrlora_deploy.cli.ranges import FiniteRange, WholeRange
from qrlora_deploy.cli.sections import write_section

if TYPE_CHECKING:
    from click.types import OptionHelpExtra

    from qrlora_deploy.exporting.options import OptionFacts

DEFAULT = "onnx"
FORMAT = "--format"
CHOSEN = "qrlora_deploy.chosen_exporter"
"""Where a context keeps the name of the exporter that the arguments name."""


class ExportCommand(click.Command):
    """A command that has the options of every exporter beside its own.

    Those of the exporter that `--format` names are read as it declares them; others are read to be refused by name.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find the exporter first: which options there are depends on it."""
        ctx.meta[CHOSEN] = named_format(args)
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, and each option of an exporter once."""
        from qrlora_deploy.exporting.options import facts_of
        from qrlora_deploy.exporting.registry import all_exporters

        chosen = ctx.meta.get(CHOSEN, DEFAULT)
        # The chosen one comes last: its declaration of an option is the one that counts.
        exporters = sorted(all_exporters(), key=lambda exporter: exporter.name == chosen)
        found = {
            name: _click_option(name, facts)
            for exporter in exporters
            for name, facts in facts_of(exporter.options).items()
        }
        return [*super().get_params(ctx), *found.values()]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options, then those of each exporter under its name, the default first."""
        from qrlora_deploy.exporting.options import facts_of
        from qrlora_deploy.exporting.registry import all_exporters

        write_section(formatter, "Options", super().get_params(ctx), ctx)
        for exporter in sorted(all_exporters(), key=lambda exporter: exporter.name != DEFAULT):
            options = [_click_option(name, facts) for name, facts in facts_of(exporter.options).items()]
            write_section(formatter, f"Options of {FORMAT} {exporter.name}", options, ctx)


def named_format(arguments: Sequence[str]) -> str:
    """The name that `--format` gives, the last one where there are several, before anything is parsed."""
    found = DEFAULT
    for argument, following in zip(arguments, [*arguments[1:], DEFAULT], strict=True):
        if argument == FORMAT:
            found = following
        elif argument.startswith(f"{FORMAT}="):
            found = argument.partition("=")[2]
    return found


def option_name(field: str) -> str:
    """How the command line calls a field."""
    return f"--{field.replace('_', '-')}"


class _Declared(click.Option):
    """An option of an exporter: click's own default stays empty, since what was not given is left to the exporter."""

    declared = ""

    def get_help_extra(self, ctx: click.Context) -> "OptionHelpExtra":
        """With the default that the exporter declares."""
        default: OptionHelpExtra = {"default": self.declared} if self.declared else {}
        return default | super().get_help_extra(ctx)


def _click_option(name: str, facts: "OptionFacts") -> click.Option:
    if facts.kind is bool:
        return click.Option([option_name(name), name], is_flag=True, help=facts.help)
    metavar = "DATA" if facts.reads else None
    made = _Declared([option_name(name), name], type=_click_type(facts), metavar=metavar, help=facts.help)
    made.declared = str(facts.default) if facts.default else ""
    return made


def _click_type(facts: "OptionFacts") -> Any:
    if facts.choices:
        return click.Choice(facts.choices)
    if facts.kind is int:
        return WholeRange(facts.least, facts.most)  # type: ignore[arg-type]  # whole numbers
    if facts.kind is float:
        return FiniteRange(facts.least, facts.most)
    return ANY_PATH if facts.kind is Path else str
