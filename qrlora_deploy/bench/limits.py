"""What a reader must know before believing the figures of a report."""

from qrlora_deploy.bench.record import Report

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
        notes.append(f"not stable within 10 %: {', '.join(unstable)}")
    notes += [
        f"server {item.subject}: a p99 needs {item.refused} requests, more than fit {report.settings.seconds:g} seconds"
        for item in report.capacities
        if item.refused
    ]
    if "swap" in report.settings.scenarios and not any(report.of("swap")):
        notes.append("nothing was swapped: that takes a switchable bundle and --customers")
    if earlier is not None:
        notes += [
            f"the earlier report is of another machine: {other}" for other in machine_differences(report, earlier)
        ]
    return notes


def machine_differences(report: Report, earlier: Report) -> list[str]:
    """What makes latencies of two reports incomparable; empty where nothing does."""
    found = []
    for name in ("cpu", "cores", "cores_allowed", "architecture"):
        now, then = report.environment.host.get(name), earlier.environment.host.get(name)
        if now != then:
            found.append(f"{name} {then} then, {now} now")
    cards = [[gpu.get("name", "") for gpu in each.environment.gpus] for each in (earlier, report)]
    if cards[0] != cards[1]:
        found.append(f"GPUs {', '.join(cards[0]) or 'none'} then, {', '.join(cards[1]) or 'none'} now")
    if report.settings.provider != earlier.settings.provider or report.settings.threads != earlier.settings.threads:
        found.append("another provider or number of threads")
    return found
