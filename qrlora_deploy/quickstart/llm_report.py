"""What a quickstart with a decoder found."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Written:
    """A held-out prompt, and what each wrote behind it, all of them rows of one batch.

    Attributes:
        prompt: its last part, which a reader wants to see.
        customer: whose prompt it is.
        expected: the answer that the data has.
        answers: by who was asked: `base`, or a customer.
    """

    prompt: str
    customer: str
    expected: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Matches:
    """One customer on prompts that nothing was trained on.

    Attributes:
        name: of the customer.
        rows: rows it was trained on.
        held_out_rows: prompts that were asked.
        before: share of them whose answer is the right one to the last letter, by the base alone.
        after: with the customer's coefficients.
    """

    name: str
    rows: int
    held_out_rows: int
    before: float
    after: float


@dataclass(frozen=True)
class LlmReport:
    """The outcome of a quickstart with a decoder.

    Attributes:
        base: its name.
        coefficients: trained numbers of one customer.
        layers: adapted layers.
        sizes: bytes on disk, by what they hold.
        customers: exact matches before and after, through the bundle.
        written: some prompts and their answers.
        rows: of the batch that wrote them.
        seconds: wall time of every step, in order.
        folder: where everything was kept, or None.
    """

    base: str
    coefficients: int
    layers: int
    sizes: dict[str, int]
    customers: tuple[Matches, ...]
    written: tuple[Written, ...]
    rows: int
    seconds: dict[str, float]
    folder: Path | None
