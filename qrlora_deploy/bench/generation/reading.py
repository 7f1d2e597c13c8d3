"""A bundle's tokenizer as training sees one, without transformers."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from qrlora_deploy.chat.template import ChatTemplate, read_chat_template, special_tokens
from qrlora_deploy.errors import library_errors
from qrlora_deploy.runtime.bundle.bundle import TOKENIZER_FILE
from qrlora_deploy.runtime.generation.prompts import read_ends


class BundleTokenizer:
    """What `answer_rows` asks of a tokenizer.

    Args:
        folder: of the bundle.

    Attributes:
        is_fast: always; it says where its tokens are.
        special_tokens_map: texts of the special tokens, by name.

    Raises:
        FileFormatError: a file of the bundle cannot be read.
    """

    is_fast = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = folder / TOKENIZER_FILE
        with library_errors(f"{path} is not a tokenizer"):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.special_tokens_map = special_tokens(folder)

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end of text, or the only one that the model's config calls so; None where there is none."""
        token = self.special_tokens_map.get("eos_token")
        if token is None:
            ends = read_ends(self._folder)
            return next(iter(ends)) if len(ends) == 1 else None
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    @cached_property
    def chat_template(self) -> str | None:
        """The source of the chat template."""
        template: ChatTemplate | None = read_chat_template(self._folder)
        return None if template is None else template.source

    def __call__(
        self, text: str, add_special_tokens: bool = True, return_offsets_mapping: bool = False
    ) -> dict[str, Sequence[Any]]:
        """`input_ids` of a text, and where each token stands in it."""
        found = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": list(found.ids), "offset_mapping": list(found.offsets)}
