"""Figures of the project's own measurements that a plan goes by.

`python -m benchmarks.planning_figures` takes them from the records under `benchmarks/results/`, which are not
installed.
"""

import re
from functools import cache
from pathlib import Path

from pydantic import Field

from qrlora_deploy.io.reading import read_text
from qrlora_deploy.io.strict import Record, from_json

FILE = Path(__file__).with_name("recorded.json")


class Rate(Record):
    """How fast a switchable bundle answered, every row another customer.

    Attributes:
        device: the GPU's name, or how many CPU cores.
        model: the base, or whose shape it had.
        block_weights: numbers in the linear layers of its blocks, which decide how long a row takes.
        coefficients: of a customer.
        precision: of the bundle.
        cuda_graph: whether runs were captured as CUDA graphs.
        batch: rows of a run.
        length: tokens of a row.
        rows_per_s: `batch` by the median time of a run.
        date: of the measurement.
        record: its file under `benchmarks/results/`.
    """

    device: str
    model: str
    block_weights: int = Field(gt=0)
    coefficients: int = Field(gt=0)
    precision: str
    cuda_graph: bool
    batch: int = Field(gt=0)
    length: int = Field(gt=0)
    rows_per_s: float = Field(gt=0)
    date: str
    record: str


class Ranks(Record):
    """How many directions tau 0.5 kept of a base's weights.

    Attributes:
        model: the base.
        coefficients: directions kept, of all layers together.
        directions: what there was, `min(out, in)` of each layer.
        date: of the measurement.
        record: its file under `benchmarks/results/`.
    """

    model: str
    coefficients: int = Field(gt=0)
    directions: int = Field(gt=0)
    date: str
    record: str


class CustomerFile(Record):
    """How large a customer's file was.

    Attributes:
        size_bytes: of the file.
        coefficients: in it, 4 bytes each; the rest says what the customer is and how it was trained.
        date: of the measurement.
        record: its file under `benchmarks/results/`.
    """

    size_bytes: int = Field(gt=0)
    coefficients: int = Field(gt=0)
    date: str
    record: str

    @property
    def rest_bytes(self) -> int:
        """Bytes beside the coefficients."""
        return self.size_bytes - 4 * self.coefficients


class Recorded(Record):
    """All figures."""

    rates: list[Rate]
    ranks: list[Ranks]
    customer_file: CustomerFile

    @property
    def kept_share(self) -> float:
        """The largest share of directions that tau 0.5 kept of a whole base: a plan should not come out too small."""
        return max(item.coefficients / item.directions for item in self.ranks)

    @property
    def devices(self) -> list[str]:
        """Names of the devices that there are rates of, in order."""
        return list(dict.fromkeys(rate.device for rate in self.rates))

    def rates_on(self, device: str) -> list[Rate]:
        """Those of the devices whose names have every word of `device`, such as "H100" or "cpu"."""
        wanted = _words(device)
        return [rate for rate in self.rates if wanted and wanted <= _words(rate.device)]


@cache
def recorded() -> Recorded:
    """The figures that are installed."""
    return from_json(Recorded, read_text(FILE), f"{FILE} is damaged")


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))
