"""What was aimed at on a GPU, and what the records say of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.decoding.aims import lines_of
from benchmarks.gpu.parts import MERGED_GRAPHS, PADDED, SETUPS, SHAPES
from benchmarks.gpu_table.aims import bars as table_bars

COMPILED = "torch.compile"
LOOP, TRAINER = "PEFT LoRA, bare loop", "PEFT LoRA, Trainer"
FLEET_TRAINER = "PEFT LoRA, transformers' Trainer"
FLEET_LOOPS = {
    "PEFT LoRA, plain loop": "the same layers",
    "PEFT LoRA on q and v of all layers, plain loop": "query and value of all layers",
}
"""Names in the record, and what LoRA adapts there."""

FLEET_TARGETS = {"paper": "query of the last 4 layers", "linear": "all linear layers"}
BOUND = "docs/benchmarks.md says what bounds it"
UNKNOWN = "the reason is not known"

Record = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """A line of the table.

    Attributes:
        what: was measured.
        value: that was found; None where the record does not hold it.
        found: the value with its unit, and what belongs to it.
        aim: in words.
        met: whether the aim is reached; None where there is no value.
        why: it was missed, or what limits it; "" where it is met.
    """

    what: str
    value: float | None
    found: str
    aim: str
    met: bool | None
    why: str = ""


@dataclass(frozen=True)
class Aim:
    """A limit, and what is known about it.

    Attributes:
        side: "least" or "most".
        unit: behind the numbers, with its space.
        why: where it is missed.
    """

    side: str
    limit: float
    unit: str = ""
    why: str = UNKNOWN


def make_bar(what: str, value: float | None, aim: Aim, beside: str = "") -> Bar:
    """Judge one figure.

    Args:
        value: None where the record does not hold it.
        beside: put behind the figure in brackets.
    """
    text = f"at {aim.side} {aim.limit:g}{aim.unit}"
    if value is None:
        return Bar(what, None, "not measured", text, None, "the record does not hold it")
    met = value >= aim.limit if aim.side == "least" else value <= aim.limit
    found = f"{number(value)}{aim.unit}{f' ({beside})' if beside else ''}"
    return Bar(what, value, found, text, met, "" if met else aim.why)


def number(value: float) -> str:
    """Three digits, and four of numbers near 1, where the third decides."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if 0.5 < abs(value) < 1.5 else f"{value:.3g}"


def at(record: Any, *keys: str) -> Any:
    """What is in a record at a path, or None."""
    for key in keys:
        if not isinstance(record, dict) or key not in record:
            return None
        record = record[key]
    return record


def shape_name(record: Record) -> str:
    """Of a record of graphs."""
    return f"{SHAPES[record['shape']]}'s shape" if record["shape"] in SHAPES else f"shape {record['shape']}"


PEERS = {
    "torch.linalg.svd": ("faster than `torch.linalg.svd` on the same device", Aim("least", 30, " times")),
    "geqp3": ("faster than LAPACK's `geqp3` on all cores of the host", Aim("least", 8, " times")),
    "torch.linalg.qr": ("time by that of unpivoted `torch.linalg.qr`", Aim("most", 2, " times")),
}


def factorization(record: Record) -> Iterator[Bar]:
    """Against other factorizations on the same machine, and the projections of a model."""
    for name, case in record["cases"].items():
        size, _, spectrum = name.partition(" ")
        if spectrum != "gaussian":
            continue
        batch, n = size.split("x")
        ours = f"{number(case['median_ms']['pivoted_qr'])} ms"
        for peer, (what, aim) in PEERS.items():
            times = at(case, "times_ours", peer)
            # The record says how many times our time the peer takes.
            value = times if aim.side == "least" or times is None else 1 / times
            yield make_bar(f"pivoted QR, {batch} × {n}², fp64: {what}", value, aim, ours)
    project = record["project"]
    # Records that do not say so are of 64 matrices of 4096.
    count, n = project.get("matrices", 64), project.get("columns", 4096)
    yield make_bar(
        f"{count} projections of {n}², fp16, to factors at τ = 0.5 on the host",
        project["median_s"],
        Aim("most", 2, " s"),
        f"{len(project['samples_s'])} runs",
    )


WHY_PADDED = (
    "it computes on the padding, about half of a large batch, and a mask keeps ONNX Runtime from flash attention"
)
WHY_PACKED = {
    "mpnet": "MPNet's position bias goes to `Attention` as a mask, which keeps ONNX Runtime from flash attention",
}


def graphs(record: Record) -> Iterator[Bar]:
    """Merged graphs by torch.compile, as a geometric mean over the batches."""
    batches = ", ".join(f"{one['batch']} × {one['length']}" for one in record["batches"])
    for packing in MERGED_GRAPHS:
        means = [at(record, "geometric_means", column, COMPILED, packing) for column in ("device_ms", "whole_ms")]
        yield make_bar(
            f"merged graph by torch.compile, {shape_name(record)}, {packing}, {batches}",
            means[0],
            Aim("most", 0.90, why=WHY_PADDED if packing == PADDED else WHY_PACKED.get(record["shape"], UNKNOWN)),
            f"{number(means[1])} host to host" if means[1] else "",
        )


WHY_SETUP = {
    "paper": "three operators in each of four blocks and a few for the table, 2 to 3 µs each, which a small batch "
    "feels, and passes over the activations, which a large one does",
    "qv of 12": "the arithmetic is 1.10, or 1.07 without the zeros that let q and v share an input, and 36 operators "
    "of 2 to 3 µs are an eighth of the smallest batch",
}
LIMITS = {"paper": 1.01, "qv of 12": 1.08}


def switchable(record: Record) -> Iterator[Bar]:
    """Switchable graphs by the merged one that packs alike, as a geometric mean over the batches."""
    for setup, layers in SETUPS.items():
        for packing in MERGED_GRAPHS:
            ratios = {
                name: at(record, "geometric_means", "device_ms", packing, f"{setup}, {packing}{name}")
                for name in ("", ", apart")
            }
            beside = ratios[", apart"]
            yield make_bar(
                f"{layers} switchable, every row another customer, by merged, {shape_name(record)}, {packing}",
                ratios[""],
                Aim("most", LIMITS[setup], why=WHY_SETUP[setup]),
                f"{number(beside)} with branches apart from their layers' products" if beside else "",
            )


def table(record: Record) -> Iterator[Bar]:
    """As `benchmarks.gpu_table` judges its own record."""
    look_up = {name: record["runs"]["look_up_us"][name]["p50"] for name in ("few, random", "all, random")}
    idle = record["swaps"]["idle_us"]
    reasons = {
        "run with all / with 100, random": f"looking up {record['batch']} random ids of all takes "
        f"{number(look_up['all, random'])} µs, of a hundred customers {number(look_up['few, random'])} µs",
        "swap while busy": f"{_rested(record)}on an idle device, one after the other, p50 is "
        f"{number(idle['always the same']['p50'])} µs and p99 {number(idle['always the same']['p99'])} µs",
    }
    reasons["throughput with all"] = reasons["run with all / with 100, random"]
    for name, found, side, limit, _met in table_bars(record):
        what, unit = name, ""
        for ending, shown in ((", us", " µs"), (", GB/s", " GB/s")):
            if name.endswith(ending):
                what, unit = name.removesuffix(ending), shown
        why = next((why for start, why in reasons.items() if name.startswith(start)), UNKNOWN)
        yield make_bar(f"{record['customers']:,} customers: {what}", found, Aim(side, limit, unit, why))


def _rested(record: Record) -> str:
    """What swaps take that come as rarely or in groups, where the record says so."""
    rested = at(record, "swaps", "idle_us", "at the rate of those beside runs")
    tens = at(record, "beside", "swap_in_tens_us")
    parts = (
        ("a thread that slept a millisecond finds its caches cold: on an idle device at this rate", rested),
        ("ten at a time, while busy,", tens),
    )
    return "".join(f"{what} p50 is {number(f['p50'])} µs and p99 {number(f['p99'])} µs; " for what, f in parts if f)


def training(record: Record) -> Iterator[Bar]:
    """The cached trunk by PEFT's LoRA, on each data set."""
    for found in record["data"].values():
        others = at(found, "times", TRAINER, "wall")
        yield make_bar(
            f"steps per second of training on the cached trunk, {record['shape']}, by PEFT's LoRA in a bare loop",
            at(found, "times", LOOP, "wall"),
            Aim("least", 3, " times"),
            f"{number(others)} by its Trainer" if others else "",
        )


def fleet(record: Record) -> Iterator[Bar]:
    """Customers an hour by PEFT's LoRA, one customer after another."""
    others, options = "others_extrapolated_from_samples", record["options"]
    trainer = at(record, others, FLEET_TRAINER, "fleet_times")
    beside = [
        f"{number(at(record, 'fleet', 'customers_an_hour') or 0)} an hour",
        *([f"{number(trainer)} times its Trainer"] if trainer else []),
    ]
    for name, layers in FLEET_LOOPS.items():
        yield make_bar(
            f"a fleet of {options['customers']} customers, {options['shape']}, {FLEET_TARGETS[options['targets']]}, by "
            f"PEFT's LoRA on {layers}, one customer after another in a bare loop",
            at(record, others, name, "fleet_times"),
            Aim("least", 20, " times", "docs/fleets.md says what bounds it"),
            ", ".join(beside),
        )


def decoding(record: Record) -> Iterator[Bar]:
    """A token of decoders."""
    for line in lines_of(record):
        if line.value is not None:
            yield make_bar(line.what, line.value, Aim("most" if line.at_most else "least", line.aim, why=BOUND))


READERS: dict[str, Callable[[Record], Iterator[Bar]]] = {
    "factorization": factorization,
    "graph": graphs,
    "switchable": switchable,
    "table": table,
    "training": training,
    "fleet": fleet,
    "decoding": decoding,
}
"""Of the parts that have aims, by their kind."""
