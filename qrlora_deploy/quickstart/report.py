"""What a quickstart found."""

from dataclasses import dataclass
from pathlib import Path

from qrlora_deploy.quickstart.measuring import Accuracy


@dataclass(frozen=True)
class CustomerResult:
    """One customer on text that nothing was trained on.

    Attributes:
        name: of the customer.
        rows: rows it was trained on.
        held_out_rows: rows it was scored on.
        before: the base alone, all coefficients zero.
        after: with the customer's coefficients.
    """

    name: str
    rows: int
    held_out_rows: int
    before: Accuracy
    after: Accuracy


@dataclass(frozen=True)
class Parity:
    """ONNX Runtime against PyTorch, from the check of the finished bundle."""

    max_abs_error: float
    bound: float
    label_agreement: float
    rows: int


@dataclass(frozen=True)
class Latency:
    """Median time from one text to its label, tokenizer included.

    Attributes:
        onnxruntime_ms: the merged bundle.
        torch_ms: the merged checkpoint in transformers.
        runs: calls of each, after some that are not counted.
    """

    onnxruntime_ms: float
    torch_ms: float
    runs: int


@dataclass(frozen=True)
class Answer:
    """One held-out text, what the bundle says, and what is right."""

    text: str
    label: str
    score: float
    expected: str


@dataclass(frozen=True)
class QuickstartReport:
    """The outcome of a quickstart.

    Attributes:
        coefficients: trained numbers of one customer.
        layers: adapted layers.
        sizes: bytes on disk, by what they hold.
        customers: accuracy before and after.
        merged: the customer that was merged and exported.
        parity: of its bundle.
        latency: of one text on this machine.
        device: what it ran on.
        answers: some texts through the bundle.
        seconds: wall time of every step, in order.
        folder: where everything was kept, or None.
    """

    coefficients: int
    layers: int
    sizes: dict[str, int]
    customers: tuple[CustomerResult, ...]
    merged: str
    parity: Parity
    latency: Latency
    device: str
    answers: tuple[Answer, ...]
    seconds: dict[str, float]
    folder: Path | None
