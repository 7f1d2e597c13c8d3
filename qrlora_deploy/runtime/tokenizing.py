"""Text to the inputs of a bundle's graph, by its own tokenizer and without transformers."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.runtime.bundle import TOKENIZER_FILE, Bundle

TEXT_INPUTS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
"""Inputs of a graph, and the attribute of an encoding that each comes from."""


class TextEncoder:
    """The tokenizer of a bundle, padding and cutting as the manifest says.

    Raises:
        FileFormatError: the tokenizer cannot be opened.
    """

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        path = bundle.folder / TOKENIZER_FILE
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # The library raises plain `Exception`.
        except Exception as error:
            raise FileFormatError(f"{path} is not a tokenizer: {error}") from error
        tokenizer.enable_truncation(manifest.max_length)
        tokenizer.enable_padding(
            direction=manifest.padding_side,
            pad_id=manifest.pad_token_id,
            pad_type_id=manifest.pad_token_type_id,
            pad_token=tokenizer.id_to_token(manifest.pad_token_id) or "[PAD]",
        )
        self.tokenizer = tokenizer
        self.names = [record.name for record in manifest.inputs if record.name in TEXT_INPUTS]

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The inputs, int64 `[batch, length]` each, padded to the longest text."""
        batch: list[Any] = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encodings = self.tokenizer.encode_batch(batch)
        return {
            name: np.array([getattr(encoding, TEXT_INPUTS[name]) for encoding in encodings], dtype=np.int64)
            for name in self.names
        }


def batches(texts: Sequence[str], pairs: Sequence[str] | None, size: int) -> Iterator[list[int]]:
    """Row numbers in batches of `size`; texts of similar length share one, so little is padded.

    Raises:
        InputError: the numbers of texts and pairs differ, or the size is not positive.
    """
    if pairs is not None and len(pairs) != len(texts):
        raise InputError(f"there are {len(texts)} texts but {len(pairs)} second texts")
    if size < 1:
        raise InputError(f"the batch size must be at least 1, not {size}")
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]) + len(pairs[row] if pairs else ""))
    for start in range(0, len(order), size):
        yield order[start : start + size]
