"""What was aimed at, and whether a record of the table meets it."""

from typing import Any


def bars(record: dict[str, Any]) -> list[tuple[str, float | None, str, float, bool]]:
    """What was aimed at: name, found, whether the limit is the "least" or the "most", limit, and whether it is met."""
    ratios, beside = record["runs"]["ratio_all_to_few"], record["beside"]
    # Early records have no windows of both.
    crowds = record.get("throughput", {}).get("ratio_all_to_few")
    limits = [
        ("cold-start load, GB/s", record["loading"]["gigabytes_per_second"], 1.0, "least"),
        ("run with all / with 100, same customers", _value(ratios["the same"]), 1.01, "most"),
        ("run with all / with 100, random ones", _value(ratios["random"]), 1.01, "most"),
        ("throughput with all / with 100, random", _value(crowds), 0.99, "least"),
        ("swap while busy, p50, us", beside["swap_us"]["p50"], 20.0, "most"),
        ("swap while busy, p99, us", beside["swap_us"]["p99"], 100.0, "most"),
        ("throughput with swaps / without", _value(beside["ratio"]), 0.99, "least"),
    ]
    return [
        (name, found, side, limit, found is not None and (found >= limit if side == "least" else found <= limit))
        for name, found, limit, side in limits
    ]


def _value(ratio: dict[str, float] | None) -> float | None:
    return None if ratio is None else ratio["value"]
