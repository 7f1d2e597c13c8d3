"""The chat template of a bundle."""

from pathlib import Path
from typing import Any

from qrlora_deploy.io.reading import is_file, parse_json, read_text
from qrlora_deploy.runtime.bundle.sealed_facts import TOKENIZER_CONFIG_FILE
from qrlora_deploy.tokenization.chat_template import ChatTemplate, choose_template

TEMPLATE_FILE = "chat_template.jinja"
MAX_CONFIG_BYTES = 64 * 2**20


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The template in `chat_template.jinja`, or else in `tokenizer_config.json`; None: the base has none.

    Raises:
        FileFormatError: a file cannot be read.
    """
    config = _tokenizer_config(folder)
    path = folder / TEMPLATE_FILE
    source = read_text(path, MAX_CONFIG_BYTES) if is_file(path) else choose_template(config.get("chat_template"))
    return None if source is None else ChatTemplate(source, _special_tokens(config))


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG_FILE
    record = parse_json(read_text(path, MAX_CONFIG_BYTES), f"{path} is not JSON") if is_file(path) else {}
    return record if isinstance(record, dict) else {}


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Tokens by the names that templates call them, such as `bos_token`; a token may be a text or an object."""
    found = {name: value.get("content") if isinstance(value, dict) else value for name, value in config.items()}
    return {name: value for name, value in found.items() if name.endswith("_token") and isinstance(value, str)}
