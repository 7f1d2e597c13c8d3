"""The tokenizer beside a model, or the reason why it cannot be used."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers

from qrlora_deploy.errors import InputError, library_errors


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer was saved with a checkpoint."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        InputError: there is none, it cannot be read, or it is code of the checkpoint's own.
    """
    _check_sentencepiece(folder)
    with library_errors(f"{folder} holds no usable tokenizer", InputError):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # transformers 5 makes a tokenizer without any word where the files are missing.
    files = sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
    if tokenizer.vocab_files_names and not any((folder / name).is_file() for name in files):
        raise InputError(f"{folder} holds no usable tokenizer: none of {', '.join(files)} is there")
    return tokenizer


def _check_sentencepiece(folder: Path) -> None:
    # transformers then tries another reader, and names the package of that one.
    models = sorted(folder.glob("*.model"))
    if models and not (folder / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
        raise InputError(
            f"{models[0]} needs the package sentencepiece, which is not installed; install it, or save the "
            f"tokenizer as tokenizer.json"
        )
