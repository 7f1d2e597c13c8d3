"""`qrlora-deploy serve --check`."""

from dataclasses import replace
from typing import TYPE_CHECKING

from qrlora_deploy.cli.output import Output
from qrlora_deploy.errors import CheckFailed

if TYPE_CHECKING:
    from qrlora_deploy.serving.assembly import Assembly, AssemblyOptions
    from qrlora_deploy.serving.opening_watch import Begin

SHOWN = 5
"""Customers' files that are named where many cannot be used."""


def checked(made_of: "AssemblyOptions", begin: "Begin") -> Output:
    """Open everything, on each device, and read each customer.

    Args:
        made_of: what is checked.
        begin: told what is opened.

    Raises:
        QrloraError: something cannot be opened.
    """
    from qrlora_deploy.serving.assembly import Assembly

    for device in made_of.devices[1:]:
        # Whether a model opens on a device is known when it did.
        Assembly(replace(made_of, run=replace(made_of.run, provider=device)), begin).close()
    return _checked_customers(Assembly(made_of, begin), begin)


def _checked_customers(assembly: "Assembly", begin: "Begin") -> Output:
    url, record = assembly.url, []
    problems: list[str] = []
    facts: dict[str, str] = {}
    for model in assembly.models:
        count, wrong = model.check_customers(begin)
        problems += wrong
        record.append({"model": model.served.name, "customers": count, "problems": wrong})
        facts[model.served.name] = f"{count} customers' files, {model.served.engine.stats().resident} in memory"
    assembly.close()
    failure = None
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        failure = CheckFailed(f"{len(problems)} customers cannot be served: {'; '.join(problems[:SHOWN])}{more}")
    headline = "" if problems else f"everything is in order; it would listen on {url}"
    return Output({"models": record, "url": url}, headline, facts, failure=failure)
