"""Figures without an aim, which the documentation quotes."""

from collections.abc import Callable, Iterator

from benchmarks.gpu.aims import COMPILED, Record, at, number, shape_name
from benchmarks.gpu.parts import MERGED_GRAPHS, SWITCHABLE_GRAPHS

Figure = tuple[str, str]
"""What, and how much."""


def factorization(record: Record) -> Iterator[Figure]:
    """Of the spectra that the others are not timed on."""
    for name, case in record["cases"].items():
        size, _, spectrum = name.partition(" ")
        if spectrum != "gaussian":
            batch, n = size.split("x")
            yield f"pivoted QR, {batch} × {n}², {spectrum}", f"{number(case['median_ms']['pivoted_qr'])} ms"


def graphs(record: Record) -> Iterator[Figure]:
    """Milliseconds of each batch, and graphs that are tried in the benchmark only."""
    yield from _medians(record, shape_name(record), (COMPILED, *MERGED_GRAPHS))
    means = at(record, "geometric_means", "device_ms", COMPILED) or {}
    for name, value in means.items():
        if name not in (COMPILED, *MERGED_GRAPHS):
            yield f"{name} by torch.compile, {shape_name(record)}", number(value)


def switchable(record: Record) -> Iterator[Figure]:
    """Milliseconds of each batch."""
    yield from _medians(record, f"{shape_name(record)}, beside switchable ones", SWITCHABLE_GRAPHS)


def _medians(record: Record, shape: str, names: tuple[str, ...]) -> Iterator[Figure]:
    sizes = " / ".join(f"{batch['batch']} × {batch['length']}" for batch in record["batches"])
    for name in names:
        medians = [at(batch, "device_ms", name, "p50") for batch in record["batches"]]
        if any(medians):
            yield f"{name}, {shape}, {sizes}", f"{' / '.join(number(one) if one else '-' for one in medians)} ms"


def table(record: Record) -> Iterator[Figure]:
    """Loading, looking up, and swaps on an idle device."""
    loading = record["loading"]
    size = f"{loading['file_bytes'] / 1e9:.3g} GB in {loading['file_in']}"
    yield f"loading {record['customers']:,} customers from one packed file of {size}", f"{loading['seconds']:.3g} s"
    for name, figures in record["runs"]["latency_ms"].items():
        look = record["runs"]["look_up_us"][name]["p50"]
        yield f"a run, {name}", f"{number(figures['p50'])} ms, of which look-up {number(look)} µs"
    for name, figures in record["swaps"]["idle_us"].items():
        yield f"a swap on an idle device, {name}", _percentiles(figures)


def swap(record: Record) -> Iterator[Figure]:
    """Each kind of sample."""
    for name, figures in record["latency_us"].items():
        yield f"{name}, {record['batch']} × {record['length']}, {record['model']}", _percentiles(figures)


def _percentiles(figures: dict[str, float]) -> str:
    return f"{number(figures['p50'])} µs, p99 {number(figures['p99'])} µs"


def training(record: Record) -> Iterator[Figure]:
    """Steps per second of everyone."""
    for data, found in record["data"].items():
        for name, one in found["subjects"].items():
            yield f"training, {record['shape']}, {data}, {name}", f"{number(one['steps_per_s'])} steps/s"


def fleet(record: Record) -> Iterator[Figure]:
    """Customers an hour of everyone."""
    options = record["options"]
    where = f"{options['shape']}, {options['targets']} targets"
    for name, found in record["others_extrapolated_from_samples"].items():
        yield f"customers an hour, {where}, {name}", number(found["customers_an_hour"])
    if record.get("peak_gpu_bytes"):
        yield f"peak memory of the device, {where}, a fleet", f"{record['peak_gpu_bytes'] / 1e9:.3g} GB"


def mixed(record: Record) -> Iterator[Figure]:
    """Milliseconds of each shape, and by the merged graph."""
    for shape in record["shapes"]:
        size = f"{shape['batch']} × {shape['length']}, {record['model']}, {record['precision']}"
        for subject, figures in shape["latency_ms"].items():
            ratio = shape["ratio_to_merged"][subject]
            yield f"mixed batch, {size}, {subject}", f"{number(figures['p50'])} ms, {number(ratio)} of merged"


def report(record: Record) -> Iterator[Figure]:
    """Medians of single runs."""
    mix = {"one": "one customer"}.get(record["settings"]["mix"], f"{record['settings']['mix']} customers")
    for one in record["measurements"]:
        median = at(one, "percentiles", "p50", "value")
        if one["scenario"] == "single-stream" and median is not None:
            size = f"{one['batch']} × {one['length']}"
            yield f"`bench`, {size}, {mix}, {one['subject']}", f"{number(median)} {one['unit']}"


READERS: dict[str, Callable[[Record], Iterator[Figure]]] = {
    "factorization": factorization,
    "graph": graphs,
    "switchable": switchable,
    "table": table,
    "swap": swap,
    "training": training,
    "fleet": fleet,
    "mixed": mixed,
    "report": report,
}
"""By the kind of the part."""
