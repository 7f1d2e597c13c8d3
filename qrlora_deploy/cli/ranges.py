"""Numbers as options take them: help shows the bounds that a user may meet, a refusal every one."""

import math
from typing import Any

import click

SHOWN_UP_TO = 100_000
"""An upper bound from here on is there for slips of the hand alone, and only noise in a help text."""


class _Range:
    """What both kinds of ranges add to click's."""

    min: Any
    max: Any
    min_open: bool
    plain: click.ParamType

    def _describe_range(self) -> str:
        lower = "" if self.min is None else f"x{'>' if self.min_open else '>='}{self.min}"
        if self.max is None or self.max >= SHOWN_UP_TO:
            return lower
        return f"{self.min}{'<' if self.min_open else '<='}x<={self.max}" if lower else f"x<={self.max}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or a usage error that names the option and the bound."""
        number = self.plain.convert(value, param, ctx)
        if isinstance(number, float) and not math.isfinite(number):
            self.plain.fail(f"{number} is not a finite number.", param, ctx)
        if self.max is not None and number > self.max:
            self.plain.fail(f"{number} is more than {self.max}.", param, ctx)
        return super().convert(number, param, ctx)  # type: ignore[misc]  # click's range, behind this one


class WholeRange(_Range, click.IntRange):
    """A whole number in a range."""

    name = "integer"
    plain = click.INT


class FiniteRange(_Range, click.FloatRange):
    """A number in a range that is none of inf and nan, which a bare range lets through."""

    name = "number"
    plain = click.FLOAT


COUNT = WholeRange(1, 2**31 - 1)
"""How many of something: more are a slip of the hand, and too large for the libraries beneath."""

RATE = FiniteRange(min=0, min_open=True, max=1e6)
"""A learning rate."""
