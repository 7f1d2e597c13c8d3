"""From a prompt to the ids that a model reads."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from pydantic import BaseModel

from qrlora_deploy.chat.template import ChatTemplate, read_chat_template
from qrlora_deploy.errors import FileFormatError, MalformedInputError, argument
from qrlora_deploy.io.reading import is_file, parse_json, read_text
from qrlora_deploy.io.strict import from_value
from qrlora_deploy.runtime.bundle.bundle import CONFIG_FILE, TOKENIZER_FILE
from qrlora_deploy.runtime.generation.requests import GenerationRequest
from qrlora_deploy.runtime.prediction.tokenizing import check_texts

GENERATION_FILE = "generation_config.json"
MAX_CONFIG_BYTES = 16 * 2**20


class PromptReader:
    """Reads prompts by the tokenizer of a bundle.

    Args:
        folder: of the bundle.
        longest: tokens that the model takes, the answer included.
        vocabulary: ids from 0 on that the model has a row for.

    Attributes:
        tokenizer: a `tokenizers.Tokenizer`.
        ends: ids of the tokens by which the model ends an answer.

    Raises:
        FileFormatError: a file of the bundle cannot be read.
    """

    def __init__(self, folder: Path, longest: int, vocabulary: int) -> None:
        self._folder, self._longest, self._vocabulary = folder, longest, vocabulary
        path = folder / TOKENIZER_FILE
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # The library raises plain `Exception`.
        except Exception as error:
            raise FileFormatError(f"{path} is not a tokenizer: {error}") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.ends = read_ends(folder)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template; None: the base has none. Texts need none, nor what renders it."""
        return read_chat_template(self._folder)

    def read(self, request: GenerationRequest) -> list[int]:
        """The ids of a request's prompt.

        Raises:
            MalformedInputError: it is empty, leaves no room for an answer, is no text, has an id that the model
                does not know, or is a chat and the base has no chat template.
        """
        prompt = request.prompt
        if isinstance(prompt, str):
            ids = self._encode(prompt, special=True)
        elif _is_chat(prompt):
            ids = self._encode(self._rendered(prompt), special=False)
        else:
            ids = self._checked(prompt)
        if not ids:
            raise MalformedInputError("the prompt is empty; give at least one token to go on from")
        if len(ids) >= self._longest:
            raise MalformedInputError(
                f"the prompt is too long: it has {len(ids)} tokens, and the model takes {self._longest} with its "
                f"answer; shorten it"
            )
        return ids

    def text_of(self, token: int) -> str:
        """What the tokenizer shows of one token; U+FFFD stands where it is a part of a character."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False))

    def _encode(self, text: str, special: bool) -> list[int]:
        check_texts([text], range(1), "prompt")
        if not text:
            return []
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return self._checked(ids)

    def _checked(self, ids: Any) -> list[int]:
        ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
        if not isinstance(ids, Sequence) or isinstance(ids, bytes):
            raise MalformedInputError(f"a prompt is a text, ids of tokens or messages, not {type(ids).__name__}")
        for value in ids:
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < self._vocabulary:
                raise MalformedInputError(
                    f"the prompt has the token {value!r:.40}, and the model knows those from 0 to "
                    f"{self._vocabulary - 1} alone"
                )
        return [int(value) for value in ids]

    def _rendered(self, messages: Any) -> str:
        """The text of a chat, up to where the answer begins."""
        if self.template is None:
            raise MalformedInputError(
                f"{self._folder} has no chat template, so it takes no messages; give one text as {argument('prompt')}"
            )
        for message in messages:
            if not all(isinstance(message.get(name), str) for name in ("role", "content")):
                raise MalformedInputError(f'a message needs texts as "role" and "content", not {dict(message)!r:.80}')
        return self.template.render(messages, add_generation_prompt=True)


class _Ends(BaseModel):
    """The entry of a config."""

    eos_token_id: int | list[int] | None = None


def read_ends(folder: Path) -> frozenset[int]:
    """Ids of the tokens that end an answer, from `generation_config.json`, or else `config.json`; maybe none.

    Raises:
        FileFormatError: the file cannot be read.
    """
    for name in (GENERATION_FILE, CONFIG_FILE):
        path = folder / name
        if not is_file(path):
            continue
        value = parse_json(read_text(path, MAX_CONFIG_BYTES), f"{path} is not JSON")
        found = from_value(_Ends, value, f"{path} cannot be used").eos_token_id
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


def check_room(prompt: Sequence[int], max_tokens: int, longest: int) -> int:
    """Tokens that an answer may have: `max_tokens`, or what the model's context leaves."""
    return min(max_tokens, longest - len(prompt))


def _is_chat(prompt: Any) -> bool:
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not prompt:
        return False
    return all(isinstance(message, Mapping) for message in prompt)
