"""Options of ONNX bundles, and which of them go together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporters.head_labels import check_head_labels, head_labels_option
from qrlora_deploy.errors import InputError, ProviderError, argument
from qrlora_deploy.exporting.options import option
from qrlora_deploy.runtime.bundle.packed_inputs import PACKED_PRECISION
from qrlora_deploy.tasks.options import OPTIONS

if TYPE_CHECKING:
    from qrlora_deploy.data.examples import Examples, TextRows

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
TABLE_DTYPES = ("fp32", "fp16")
PROVIDERS = ("cpu", "cuda", "tensorrt")
ATTENTIONS = ("auto", "standard", "packed")
MERGEABLE = ("fp32", "fp16")
"""Precisions that merged weights are kept in."""


@dataclass(frozen=True)
class OnnxOptions:
    """Options of the exporter "onnx".

    Attributes:
        head_labels: most labels that a customer's own head may have, in a switchable bundle; 0: all use the base's.
        precision: of weights and activations, one of `PRECISIONS`.
        calibration: texts that int8 finds the scales of its activations on; None: while the graph runs.
        table_dtype: of the coefficient table of a switchable bundle, one of `TABLE_DTYPES`.
        padding_free: the graph computes on the tokens that take part, given by one more input.
        attention: of a padding-free bundle, one of `ATTENTIONS`. "packed": it has a second graph, for CUDA, whose
            attention takes packed tokens; "auto": so it has where that is possible.
        small_batches: packed attention takes query, key and value from one product, which is faster up to some 4,000
            tokens in a batch and slower beyond.
        merged_cache: of a switchable bundle: it has the graphs for one customer too.
        data: texts of the check that ends the export; None: what comes with the project.
        provider: execution provider of that check, one of `PROVIDERS`.
        task: what the base is for, by what `--task` calls it, in a switchable bundle; None: what its config says.
    """

    head_labels: int = head_labels_option(
        "Switchable: customers may have a head of their own, with at most this many labels."
    )
    precision: str = option(
        "fp32",
        "Of weights and activations; inputs and logits stay as they are. bf16 needs the provider cuda; int8 is for the "
        "CPU, and customers of a switchable bundle stay in fp32. int4 is for decoders.",
        choices=PRECISIONS,
    )
    calibration: "TextRows | None" = option(
        None,
        "int8: texts like those that will be served, labelled or not; scales of activations are found on up to 128 of "
        "them, and an answer no longer depends on its batch. By default they are found while the graph runs, which "
        "keeps a little more of a customer's effect.",
        reads="texts",
    )
    table_dtype: str = option(
        "fp32",
        "Switchable: of the customers' coefficients on the device. fp16 takes half the memory; files stay fp32.",
        choices=TABLE_DTYPES,
    )
    padding_free: bool = option(
        False,
        "The linear layers of an encoder compute on text alone, not on padding; for batches of uneven lengths. The "
        "graph gets one more input, token_index, which this project's sessions fill in.",
    )
    attention: str = option(
        "auto",
        "Of a padding-free bundle for the provider cuda: packed adds a second graph, whose attention works on the "
        "tokens of right-padded batches as they lie, in fp16; sessions choose by the mask. auto: where it is "
        "possible.",
        choices=ATTENTIONS,
    )
    small_batches: bool = option(
        False,
        "Of packed attention: query, key and value are one product. On an H200 a tenth faster for batches of up to "
        "600 tokens, even at 4,000, a tenth slower at 11,000.",
    )
    merged_cache: bool = option(
        False,
        "Switchable, in fp32 or fp16: two more graphs, by which a session keeps merged weights of customers who have "
        "whole batches for themselves (merged_cache_bytes); such batches then run as in a merged bundle.",
    )
    data: "Examples | None" = option(
        None,
        "Texts of the parity check, by default ones of this project. Where its labels are the model's, accuracy is "
        "measured too, on up to 512 rows, in PyTorch in fp32 and in the export; switchable: the base's. Where none of "
        "them is the model's, or for switchable not all, only the texts are used.",
        reads="examples",
    )
    provider: str = option(
        "cpu",
        "Execution provider of ONNX Runtime; refused, not replaced, where it does not load.",
        choices=PROVIDERS,
    )
    task: str | None = option(
        None,
        "Switchable: what the base is for, where its config.json leaves that open: one output may be a number or a "
        "reranker's score. A customer's file says it by itself.",
        choices=tuple(OPTIONS),
    )

    def __post_init__(self) -> None:
        """Refuse what no graph can be, before anything is opened.

        Raises:
            InputError: a value is unknown, or two options do not go together; the line names them.
            ProviderError: the provider cannot compute in the precision.
        """
        check_head_labels(self.head_labels)
        check_precision(self.precision, self.provider, self.calibration is not None)
        if self.task is not None and self.task not in OPTIONS:
            raise InputError(f"unknown {argument('task')} {self.task!r}; choose from {', '.join(OPTIONS)}")
        if self.table_dtype not in TABLE_DTYPES:
            raise InputError(
                f"unknown {argument('table_dtype')} {self.table_dtype!r}; choose from {', '.join(TABLE_DTYPES)}"
            )
        if self.padding_free and self.calibration is not None:
            raise InputError(
                f"{argument('calibration')} runs padded batches, which a padding-free graph does not take; "
                "leave one out"
            )
        if self.merged_cache and self.precision not in MERGEABLE:
            raise InputError(f"{argument('merged_cache')} needs {argument('precision', 'fp32')} or fp16")
        if self.small_batches and (self.merged_cache or not self.packs):
            raise InputError(
                f"{argument('small_batches')} is for packed attention ({argument('padding_free')}, "
                f"{argument('provider', 'cuda')}, {argument('precision', 'fp16')}), without {argument('merged_cache')}"
            )
        if self.attention not in ATTENTIONS:
            raise InputError(f"unknown {argument('attention')} {self.attention!r}; choose from {', '.join(ATTENTIONS)}")
        if self.attention == "packed" and not self._packable:
            raise InputError(
                f"{argument('attention', 'packed')} needs {argument('padding_free')}, {argument('provider', 'cuda')} "
                f"and {argument('precision', 'fp16')}; without it standard attention is written"
            )

    @property
    def packs(self) -> bool:
        """Whether packed attention is to be written, where the model allows it."""
        return self.attention != "standard" and self._packable

    @property
    def _packable(self) -> bool:
        return self.padding_free and self.provider == "cuda" and self.precision == PACKED_PRECISION


def check_precision(precision: str, provider: str, calibrated: bool = False) -> None:
    """Make sure that the precision is a known one, and that the provider is made for it.

    Args:
        precision: of the graph.
        provider: of its check.
        calibrated: whether texts to calibrate on were given.

    Raises:
        InputError: it is not; the message lists those that are. Or int8 was asked for on a GPU, or
            there is nothing to calibrate.
        ProviderError: bf16 was asked for on the CPU.
    """
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    if precision in ("int8", "int4") and provider != "cpu":
        # ONNX Runtime's GPU providers have no kernel for its products and would copy to the CPU for each.
        raise InputError(
            f"{precision} is for the CPU, not {argument('provider', provider)}; "
            f"choose {argument('precision', 'fp16')} there"
        )
    if precision == "bf16" and provider == "cpu":
        raise ProviderError(
            "cpu cannot run a graph in bf16: ONNX Runtime has no kernels for it there; export and verify it with "
            f"{argument('provider', 'cuda')}"
        )
    if calibrated and precision != "int8":
        raise InputError(
            f"{argument('calibration')} belongs to {argument('precision', 'int8')}; {precision} has no scales to find"
        )
