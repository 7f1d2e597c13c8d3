"""What a reader must know before believing the figures of a report."""

from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.report_parts import Environment, Settings
from qrlora_deploy.errors import argument

BUSY_LOAD = 0.5
"""Load of the machine at the start, by its cores, above which the report says so."""


def describe_limits(report: Report, earlier: Report | None) -> list[str]:
    """What a reader must know before believing a figure."""
    notes = []
    cores = report.environment.host.get("cores")
    load = report.environment.load_average
    if load is not None and isinstance(cores, int) and load > BUSY_LOAD * cores:
        notes.append(f"the machine was busy at the start: load {load:.1f} on {cores} cores")
    unstable = [f"{item.subject} {item.scenario} {item.shape}" for item in report.measurements if item.stable is False]
    if unstable:
        notes.append(f"not stable within 10 %: {', '.join(dict.fromkeys(unstable))}")
    notes += [
        f"server {item.subject}: a p99 needs {item.refused} requests, more than fit {report.settings.seconds:g} seconds"
        for item in report.capacities
        if item.refused
    ]
    if "swap" in report.settings.scenarios and not any(report.of("swap")):
        notes.append(f"nothing was swapped: that takes a switchable bundle and {argument('customers')}")
    if earlier is not None:
        differences = machine_differences(report.environment, report.settings, earlier)
        notes += [f"the earlier report is of another machine: {other}" for other in differences]
    return notes


def machine_differences(environment: Environment, settings: Settings, earlier: Report) -> list[str]:
    """What makes latencies of two reports incomparable; empty where nothing does."""
    found = []
    for name in ("cpu", "cores", "cores_allowed", "architecture"):
        now, then = environment.host.get(name), earlier.environment.host.get(name)
        if now != then:
            found.append(f"{name} {then} then, {now} now")
    cards = [[gpu.get("name", "") for gpu in each.gpus] for each in (earlier.environment, environment)]
    if cards[0] != cards[1]:
        found.append(f"GPUs {', '.join(cards[0]) or 'none'} then, {', '.join(cards[1]) or 'none'} now")
    then_settings = earlier.settings
    if (settings.provider, settings.threads) != (then_settings.provider, then_settings.threads):
        found.append("another provider or number of threads")
    return found
