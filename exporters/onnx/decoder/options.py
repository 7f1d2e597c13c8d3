"""Which options of ONNX bundles are for decoders."""

from exporters.onnx.options import OnnxOptions
from qrlora_deploy.errors import InputError, ProviderError, argument


def check_options(options: OnnxOptions) -> None:
    """Make sure that options are for decoders.

    Raises:
        InputError: one belongs to models that answer texts as a whole.
        ProviderError: the provider has no attention in the precision.
    """
    given = {
        "head_labels": bool(options.head_labels),
        "padding_free": options.padding_free,
        "attention": options.attention != "auto",
        "merged_cache": options.merged_cache,
        "calibration": options.calibration is not None,
        "task": options.task not in (None, "causal-lm"),
    }
    wrong = [name for name, is_given in given.items() if is_given]
    if wrong:
        raise InputError(f"{argument(wrong[0])} is not for decoders, which write text; leave it out")
    if options.precision == "fp32" and options.provider != "cpu":
        raise ProviderError(
            f"{options.provider} has no attention with a cache in fp32; export with {argument('precision', 'fp16')} or "
            f"{argument('precision', 'bf16')} there"
        )
