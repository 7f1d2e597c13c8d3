"""Numbers as options take them: help shows the bounds that a user may meet, a refusal every one."""

import math
from typing import Any

import click

SHOWN_UP_TO = 100_000
"""An upper bound from here on is there for slips of the hand alone, and only noise in a help text."""


def _shown(least: float | None, most: float | None, above: bool) -> str:
    lower = "" if least is None else f"x{'>' if above else '>='}{least}"
    if most is None or most >= SHOWN_UP_TO:
        return lower
    return f"{least}{'<' if above else '<='}x<={most}" if lower else f"x<={most}"


class WholeRange(click.IntRange):
    """A whole number in a range."""

    name = "integer"

    def _describe_range(self) -> str:
        return _shown(self.min, self.max, self.min_open)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or a usage error that names the option and the bound."""
        number = click.INT.convert(value, param, ctx)
        if self.max is not None and number > self.max:
            self.fail(f"{number} is more than {self.max}.", param, ctx)
        return super().convert(number, param, ctx)


class FiniteRange(click.FloatRange):
    """A number in a range that is none of inf and nan, which a bare range lets through."""

    name = "number"

    def _describe_range(self) -> str:
        return _shown(self.min, self.max, self.min_open)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or a usage error that names the option and the bound."""
        number = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        if self.max is not None and number > self.max:
            self.fail(f"{number} is more than {self.max}.", param, ctx)
        return super().convert(number, param, ctx)


COUNT = WholeRange(1, 2**31 - 1)
"""How many of something: more are a slip of the hand, and too large for the libraries beneath."""

RATE = FiniteRange(min=0, min_open=True, max=1e6)
"""A learning rate."""
