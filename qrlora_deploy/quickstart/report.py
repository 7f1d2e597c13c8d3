"""What a quickstart found, and how it is shown."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrlora_deploy.cli.output import Output, Table, size_text
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
    """Median time from one text to its label on the CPU, tokenizer included.

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
        cpu_count: processors of this machine.
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
    cpu_count: int
    answers: tuple[Answer, ...]
    seconds: dict[str, float]
    folder: Path | None


def output_of(report: QuickstartReport) -> Output:
    """The report as a command prints it."""
    kept = f"kept in {report.folder}" if report.folder else "nothing was kept; --out FOLDER keeps it"
    steps = ", ".join(f"{step} {seconds:.0f}" for step, seconds in report.seconds.items())
    facts = {
        "coefficients per customer": f"{report.coefficients} in {report.layers} layers, head shared",
        **{f"size of {name}": size_text(size) for name, size in report.sizes.items()},
        "parity with PyTorch": _parity_text(report.parity),
        "latency of one text, median": _latency_text(report),
        "time": f"{sum(report.seconds.values()):.0f} s: {steps}",
        "files": kept,
    }
    headline = f"{len(report.customers)} customers on one base; {report.merged} merged, exported and verified"
    return Output(report, headline, facts, [_accuracy_table(report), _answer_table(report)])


def _accuracy_table(report: QuickstartReport) -> Table:
    columns = ("customer", "trained on", "held out", "base", "customer's", "base, 15 labels", "customer's, 15 labels")
    rows: list[list[Any]] = [
        [
            result.name,
            result.rows,
            result.held_out_rows,
            *(f"{100 * value:.1f} %" for value in (result.before.all_labels, result.after.all_labels)),
            *(f"{100 * value:.1f} %" for value in (result.before.own_labels, result.after.own_labels)),
        ]
        for result in report.customers
    ]
    return Table(columns, rows, "Accuracy on held-out text, among all 150 labels and among the customer's 15")


def _answer_table(report: QuickstartReport) -> Table:
    rows = [[answer.text, answer.label, answer.score, answer.expected] for answer in report.answers]
    return Table(("text", "label", "score", "expected"), rows, f"Held-out text through the bundle of {report.merged}")


def _parity_text(parity: Parity) -> str:
    return (
        f"max abs error {parity.max_abs_error:.1e} (bound {parity.bound:.1e}), "
        f"labels agree {100 * parity.label_agreement:.1f} % of {parity.rows} rows"
    )


def _latency_text(report: QuickstartReport) -> str:
    latency = report.latency
    return (
        f"{latency.onnxruntime_ms:.2f} ms ONNX Runtime, {latency.torch_ms:.2f} ms PyTorch "
        f"({latency.runs} runs each, {report.cpu_count} CPUs)"
    )
