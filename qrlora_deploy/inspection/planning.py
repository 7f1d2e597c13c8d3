"""What a fleet of customers will take, before anyone buys: memory, files and rows a second.

It reads `config.json` and the headers of safetensors files, and with a basis the bytes of two weights, by which it is
told from a basis of another base; nothing is loaded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.config_file import ModelConfig, label_names, read_model_config
from qrlora_deploy.inspection.adapted_layers import Layer, estimated, layers_of_basis, linear_layers
from qrlora_deploy.inspection.recorded import Rate, Recorded, recorded
from qrlora_deploy.io.reading import is_file
from qrlora_deploy.models.weight_files import StoredTensor, read_headers, weight_files
from qrlora_deploy.runtime.bundle.row_layout import TABLE_DTYPES, HeadLayout, TableLayout
from qrlora_deploy.runtime.customers.packed_header import PackedHeader, metadata_for

ID_BYTES = 16
"""Of a customer's name in a packed file, where nobody has named them yet."""

DISK_BLOCK = 4096
"""A file takes whole blocks of this many bytes on most file systems."""

BASE_ROWS = 1
"""Rows of a table that are no customer's: the base's own."""

PRECISIONS = tuple(TABLE_DTYPES)
STORED = {"fp32": "F32", "fp16": "F16"}
"""How packed files call them."""


@dataclass(frozen=True)
class Size:
    """What one thing takes.

    Attributes:
        name: what.
        where: "memory" or "disk".
        size_bytes: by precision of the bundle and its table, "fp32" and "fp16".
        how: from what it was counted.
    """

    name: str
    where: str
    size_bytes: Mapping[str, int]
    how: str


@dataclass(frozen=True)
class Speed:
    """A rate that was measured, and what it suggests for the planned base.

    Attributes:
        measured: the record.
        rows_per_s: an estimate: the measured rate by the ratio of the linear layers' weights, where the base has more
            of them; never more than was measured, for what a run takes at least does not shrink with the base.
    """

    measured: Rate
    rows_per_s: float


@dataclass(frozen=True)
class Plan:
    """What a fleet takes.

    Attributes:
        base: the folder.
        customers: how many.
        layers: number of adapted layers.
        coefficients: of a customer.
        table_width: columns of the coefficient table, each layer's rank padded.
        basis_from: where the ranks came from: the basis file, or how they were estimated.
        sizes: of everything, in order.
        speeds: on the device that was asked for, or on all that were measured.
        note: what is to be said of the speeds; empty where nothing is.
    """

    base: Path
    customers: int
    layers: int
    coefficients: int
    table_width: int
    basis_from: str
    sizes: tuple[Size, ...]
    speeds: tuple[Speed, ...]
    note: str

    @property
    def memory_bytes(self) -> dict[str, int]:
        """What a serving process holds in the memory of its device, by precision, without activations."""
        parts = [size for size in self.sizes if size.where == "memory"]
        return {name: sum(size.size_bytes[name] for size in parts) for name in PRECISIONS}


def make_plan(
    base: Path,
    customers: int,
    *,
    gpu: str | None = None,
    basis: Path | None = None,
    rank: int | None = None,
    labels: int = 0,
) -> Plan:
    """Count what `customers` customers of `base` take.

    Args:
        base: folder of a checkpoint.
        customers: how many there will be, at least 1.
        gpu: words of a device's name, such as "H100" or "cpu"; None: every one that was measured.
        basis: a basis file of the base; None: every linear layer of every block, with ranks estimated.
        rank: a fixed rank of every layer, in place of what tau 0.5 would keep; not with a basis.
        labels: of the customers' own output layers; 0: all use the base's.

    Raises:
        InputError: the base or the basis cannot be read, has no such layers, or numbers make no sense.
        BasisMismatchError: the basis is of other weights.
    """
    if customers < 1 or labels < 0 or (rank is not None and rank < 1):
        raise InputError("a plan needs at least 1 customer, ranks of at least 1 and no negative number of labels")
    if basis is not None and rank is not None:
        raise InputError("a basis has its ranks; give either a basis or a rank")
    if not is_file(base / "config.json"):
        fetch = "`hf download NAME --local-dir base` fetches one of the hub"
        raise InputError(f"{base} holds no config.json: give the folder of a checkpoint; {fetch}")
    figures, config = recorded(), read_model_config(base / "config.json")
    stored = read_headers(weight_files(base))
    weights = linear_layers(stored, base / "config.json")
    if basis is None:
        layers, basis_from = estimated(weights, rank, figures)
    else:
        layers, basis_from = layers_of_basis(basis, stored), str(basis)
    head = _head(config, base, labels)
    sizes = _in_memory(stored, layers, customers, head)
    sizes += _bases_on_disk(stored, layers, basis)
    sizes += _customers_on_disk(layers, customers, head, label_names(config, base / "config.json"), figures)
    speeds, note = _speeds(gpu, sum(map(math.prod, weights.values())), figures)
    table = TableLayout([layer.rank for layer in layers])
    return Plan(base, customers, len(layers), table.total_rank, table.width, basis_from, sizes, speeds, note)


def _head(config: ModelConfig, base: Path, labels: int) -> HeadLayout | None:
    if not labels:
        return None
    if not config.hidden_size:
        raise InputError(f"{base}/config.json names no hidden_size, so the size of customers' output layers is unknown")
    return HeadLayout(labels, config.hidden_size)


def _in_memory(
    stored: Mapping[str, StoredTensor], layers: Sequence[Layer], customers: int, head: HeadLayout | None
) -> tuple[Size, ...]:
    numbers = sum(math.prod(tensor.shape) for tensor in stored.values())
    table = TableLayout([layer.rank for layer in layers])
    # A graph has the factors with their ranks padded as in the table.
    padded = zip(layers, table.padded_ranks, strict=True)
    factors = sum(rank * (layer.out + layer.width) for layer, rank in padded)
    rows = customers + BASE_ROWS
    sizes = (
        Size("base", "memory", _each(numbers), f"{numbers} numbers"),
        Size("basis", "memory", _each(factors), f"{factors} numbers, ranks padded"),
        Size("coefficient table", "memory", _each(rows * table.width), f"{rows} rows x {table.width} columns"),
    )
    if head is None:
        return sizes
    how = f"{rows} rows x {head.width} columns, always fp32"
    return (*sizes, Size("customers' output layers", "memory", _same(4 * rows * head.width), how))


def _bases_on_disk(stored: Mapping[str, StoredTensor], layers: Sequence[Layer], basis: Path | None) -> tuple[Size, ...]:
    files = {tensor.file for tensor in stored.values()}
    base = Size("base", "disk", _same(sum(file.stat().st_size for file in files)), "its files")
    if basis is not None:
        return base, Size("basis", "disk", _same(basis.stat().st_size), "its file")
    factors = sum(layer.rank * (layer.out + layer.width) + min(layer.out, layer.width) for layer in layers)
    return base, Size("basis", "disk", _same(4 * factors), f"{factors} numbers, always fp32")


def _customers_on_disk(
    layers: Sequence[Layer], customers: int, head: HeadLayout | None, outputs: Sequence[str], figures: Recorded
) -> tuple[Size, ...]:
    coefficients = sum(layer.rank for layer in layers)
    numbers = coefficients + (head.width if head else 0)
    one = 4 * numbers + figures.customer_file.rest_bytes
    blocks = -(-one // DISK_BLOCK) * DISK_BLOCK
    files = (
        Size("one customer's file", "disk", _same(one), f"{numbers} numbers, always fp32, and what it says"),
        Size("all customers' files", "disk", _same(customers * blocks), f"in blocks of {DISK_BLOCK} bytes"),
    )
    if head is not None:
        # Customers with output layers of their own cannot be packed.
        return files
    said = metadata_for("0" * 64, "0" * 64, "text-classification", outputs)
    packed = {
        name: PackedHeader(said, customers, coefficients, ID_BYTES * customers, stored).size_bytes
        for name, stored in STORED.items()
    }
    return (*files, Size("packed file of all", "disk", packed, f"names of {ID_BYTES} bytes"))


def _each(numbers: int) -> dict[str, int]:
    return {name: numbers * dtype.itemsize for name, dtype in TABLE_DTYPES.items()}


def _same(size: int) -> dict[str, int]:
    return dict.fromkeys(PRECISIONS, size)


def _speeds(gpu: str | None, block_weights: int, figures: Recorded) -> tuple[tuple[Speed, ...], str]:
    rates = figures.rates if gpu is None else figures.rates_on(gpu)
    if not rates:
        return (), f"no figure is recorded on {gpu}; there are figures on {', '.join(figures.devices)}"
    smallest = min(rate.block_weights for rate in rates)
    note = ""
    if block_weights < smallest:
        note = (
            f"not measured on so small a base: the estimates are the rates of larger ones, of {smallest} weights in "
            f"their blocks and more, where this one has {block_weights}; it should be no slower"
        )
    return tuple(Speed(rate, rate.rows_per_s * min(1.0, rate.block_weights / block_weights)) for rate in rates), note
