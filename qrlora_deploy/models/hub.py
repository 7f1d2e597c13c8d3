"""Bases from the Hugging Face hub."""

from pathlib import Path

from qrlora_deploy.errors import InputError, first_line

PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""Files of a repository that are fetched: no code, and no weights that need unpickling."""

SMALL_DECODER = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""A decoder to try things with where none is named."""


def fetch_snapshot(name: str) -> Path:
    """The folder of a repository's files, fetched or from the cache.

    Raises:
        InputError: there is no such repository, or it cannot be reached.
    """
    # Imported here: most bases are folders.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{name} is neither a folder nor a reachable hub repository: {first_line(error)}") from error
