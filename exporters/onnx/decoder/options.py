"""Which options of ONNX bundles are for decoders."""

from exporters.onnx.options import OnnxOptions
from qrlora_deploy.errors import InputError, argument


def check_options(options: OnnxOptions) -> None:
    """Refuse, by an InputError, what belongs to models that answer texts as a whole."""
    given = {
        "head_labels": bool(options.head_labels),
        "padding_free": options.padding_free,
        "calibration": options.calibration is not None,
        "task": options.task not in (None, "causal-lm"),
    }
    wrong = [name for name, is_given in given.items() if is_given]
    if wrong:
        raise InputError(f"{argument(wrong[0])} is not for decoders, which write text; leave it out")
