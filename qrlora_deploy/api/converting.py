"""From a GGUF file to a base."""

from pathlib import Path
from typing import Any

from qrlora_deploy.api.inputs import StrPath
from qrlora_deploy.models.gguf_files import convert_gguf


def convert(source: StrPath, output: StrPath, *, dtype: str = "fp32") -> dict[str, Any]:
    """Write the decoder of a GGUF file as a checkpoint in safetensors, with its tokenizer and chat template.

    Quantised weights become the numbers that they stand for: what rounding took is not given back.

    Args:
        source: the file.
        output: the new checkpoint's folder, which must not hold anything yet.
        dtype: of the weights that are written: "fp32", "fp16" or "bf16".

    Returns:
        What the folder holds as `conversion.json`: the digests of the file and of the checkpoint, and more, plain JSON
        values.

    Raises:
        MissingPartError: the package gguf is not installed.
        InputError: the file is none, transformers does not know its kind of model, or `output` is taken.
        QrloraError: the disk is full, or the checkpoint does not answer as the file does; nothing is left behind.
    """
    return convert_gguf(Path(source), Path(output), dtype)
