"""The parts of a bundle's manifest."""

from typing import Literal

from pydantic import Field

from qrlora_deploy.io.strict import Record

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]


class TargetRecord(Record):
    """One adapted layer; `padded_rank` is the rank in the table of a switchable bundle."""

    name: str
    rank: int = Field(gt=0)
    padded_rank: int = Field(gt=0)


class TensorRecord(Record):
    """One input or output of the graph; a dynamic axis has a name instead of a size."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class CalibrationRecord(Record):
    """What the constant scales of an int8 graph's activations were found on.

    Attributes:
        method: "minmax": a scale is the range of its activation over all rows.
        rows: texts that were run for it.
        texts_digest: SHA-256 over these texts in their order; the same rows in another file format agree.
    """

    method: Literal["minmax"]
    rows: int = Field(gt=0)
    texts_digest: str = Field(pattern=r"^[0-9a-f]{64}$")


class ParityRecord(Record):
    """The parity check that the export ended with.

    Attributes:
        effect_correlation: cosine of the customers' effect, `logits(c) - logits(0)`, in the graph
            and in PyTorch, over all logits; None in bundles of earlier versions, and where there is
            no effect to compare with.
        effect_error: largest difference of the two effects, relative to the largest effect.
        accuracy: share of right labels of the graph.
        accuracy_reference: of PyTorch in fp32.
            accuracy_rows: on so many labelled rows. None where the export was given no labels of
            the model's. In a switchable bundle they are the base's.
        not_shown: what the texts could not tell: without it PyTorch gives the same logits to within the bound.
            Empty where everything was shown, and in bundles of earlier versions.
    """

    max_abs_error: float = Field(ge=0)
    bound: float = Field(gt=0)
    label_agreement: float = Field(ge=0, le=1)
    cases: int = Field(gt=0)
    worst: str
    provider: str
    effect_correlation: float | None = Field(default=None, ge=-1, le=1)
    effect_error: float | None = Field(default=None, ge=0)
    accuracy: float | None = Field(default=None, ge=0, le=1)
    accuracy_reference: float | None = Field(default=None, ge=0, le=1)
    accuracy_rows: int | None = Field(default=None, gt=0)
    not_shown: tuple[str, ...] = ()
