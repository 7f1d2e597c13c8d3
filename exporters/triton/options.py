"""Options of the exporter "triton"; light enough for `--help`."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporters.head_labels import check_head_labels, head_labels_option
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.exporting.options import option
from qrlora_deploy.tasks.options import OPTIONS

if TYPE_CHECKING:
    from qrlora_deploy.data.examples import Examples

PRECISIONS = ("fp32", "fp16")
PROVIDERS = ("cpu", "cuda")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""What Triton, its clients and every file system take for the name of a model."""

MAX_ROWS = 4096


@dataclass(frozen=True)
class TritonOptions:
    """Options of the exporter "triton".

    Attributes:
        name: of the model that takes texts; the graph's is `NAME_graph`.
        customers: folder in which the front looks for customers' files, on the machine that serves; empty: none.
        packed: packed file of customers there; empty: none.
        max_batch: rows of a batch at most.
        max_queue: requests that wait for each of the two models; more are refused.
        queue_delay_us: how long Triton waits for more requests before a batch starts, in microseconds.
        queue_timeout_ms: after which a request that still waits is refused, in milliseconds; 0: never.
        instances: of the graph, on each device.
        fronts: processes that tokenise and look customers up; each holds the customers by itself.
        head_labels: most labels that a customer's own head may have; 0: all use the base's.
        precision: of weights and activations, one of `PRECISIONS`.
        data: texts of the check that ends the export; None: what comes with the project.
        provider: execution provider of that check, and where Triton runs the graph: one of `PROVIDERS`.
        task: what the base is for, by what `--task` calls it; None: what its config says.
    """

    name: str = option("qrlora", "Of the model that takes texts; the graph is a model of its own, NAME_graph.")
    customers: str = option(
        "/customers", "Folder in which the front finds customers' files, on the machine that serves; '' for none."
    )
    packed: str = option("", "Packed file of customers, on the machine that serves.")
    max_batch: int = option(64, "Rows of a batch at most.", least=1, most=MAX_ROWS)
    max_queue: int = option(1024, "Requests that wait for a model; more are refused.", least=1, most=2**20)
    queue_delay_us: int = option(
        0, "Microseconds that Triton waits for more requests before it starts a batch.", least=0, most=10**6
    )
    queue_timeout_ms: int = option(
        0, "Milliseconds after which a request that still waits is refused; 0: never.", least=0, most=86_400_000
    )
    instances: int = option(1, "Instances of the graph on each device.", least=1, most=64)
    fronts: int = option(1, "Processes that tokenise and look customers up.", least=1, most=64)
    head_labels: int = head_labels_option("Customers may have a head of their own, with at most this many labels.")
    precision: str = option("fp32", "Of weights and activations; inputs and answers stay fp32.", choices=PRECISIONS)
    data: "Examples | None" = option(
        None, "Texts of the parity check, by default ones of this project.", reads="examples"
    )
    provider: str = option("cpu", "Of the check, and where Triton runs the graph.", choices=PROVIDERS)
    task: str | None = option(
        None, "What the base is for, where its config.json leaves that open.", choices=tuple(OPTIONS)
    )

    def __post_init__(self) -> None:
        """Refuse what no repository can be, before anything is opened, by an InputError."""
        check_head_labels(self.head_labels)
        if not NAME.fullmatch(self.name):
            raise InputError(
                f"{argument('name')} must be of letters, digits, '_', '-' and '.', as Triton names models, "
                f"not {self.name!r:.60}"
            )

    @property
    def graph_name(self) -> str:
        """Of the model that runs the graph."""
        return f"{self.name}_graph"
