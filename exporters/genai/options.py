"""Options of the exporter "genai"; light enough for `--help`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.exporting.options import option

if TYPE_CHECKING:
    from qrlora_deploy.data.examples import Examples

VARIANTS = ("rows", "drop-in")
PRECISIONS = ("fp32", "fp16", "int8", "int4")
TABLE_DTYPES = ("fp32", "fp16")
PROVIDERS = ("cpu", "cuda")
BUILDERS = ("auto", "family", "torch")


@dataclass(frozen=True)
class GenaiOptions:
    """Options of the exporter "genai".

    Attributes:
        variant: of a form for all customers, one of `VARIANTS`; None: "rows". With a customer it is folded in.
        precision: of weights and activations, one of `PRECISIONS`.
        table_dtype: of the coefficient table, one of `TABLE_DTYPES`.
        builder: how the graph is made, one of `BUILDERS`.
        data: texts of the check that ends the export; None: what comes with the project.
        provider: execution provider of that check, and where onnxruntime-genai runs the model: one of `PROVIDERS`.
    """

    variant: str | None = option(
        None,
        "Without a customer. rows: a customer in each row of a batch, by the inputs coefficient_table and slot; "
        "drop-in: an ordinary model, whose customers are files of the exporter onnx-adapter, one for a whole "
        "batch. By default rows.",
        choices=VARIANTS,
    )
    precision: str = option("fp32", "Of weights and activations; logits stay fp32.", choices=PRECISIONS)
    table_dtype: str = option("fp32", "Of the customers' coefficients on the device.", choices=TABLE_DTYPES)
    builder: str = option(
        "auto",
        "How the graph is made. family: from the description of the base's family, its cache in place; torch: "
        "transformers' own model is traced, in fp32 on the CPU, its cache grows; auto: the first where it can be.",
        choices=BUILDERS,
    )
    data: "Examples | None" = option(
        None, "Texts of the parity check, by default ones of this project.", reads="examples"
    )
    provider: str = option("cpu", "Of the check, and where onnxruntime-genai runs the model.", choices=PROVIDERS)

    def __post_init__(self) -> None:
        """Refuse what no model can be, before anything is opened, by an InputError."""
        if self.builder == "torch" and self.precision != "fp32":
            raise InputError(f"{argument('builder', 'torch')} is for fp32; leave {argument('precision')} out")
        if self.variant == "drop-in" and self.table_dtype != "fp32":
            raise InputError(f"{argument('table_dtype')} is fp32 for drop-in: adapters hold fp32")
        on_gpu = self.provider == "cuda"
        if on_gpu != (self.precision == "fp16"):
            better = argument("precision", "fp16") if on_gpu else argument("provider", "cuda")
            raise InputError(
                f"{self.precision} is not for {argument('provider', self.provider)}; give {better} with it"
            )
