"""The command line: `qrlora-deploy COMMAND`, one module per command."""

import atexit
import gc
import logging
import os
import sys
import warnings

from qrlora_deploy.cli.group import cli
from qrlora_deploy.cli.streams import prepare_streams

QUIET = {
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Read by the libraries when they are imported; a variable that the user has set wins."""

KEEPING = ("export",)
"""Commands that make millions of objects, by loading packages and by tracing, which live as long as the process."""


def main() -> None:
    """Entry point of the console script: stderr carries our progress and one line per error."""
    if "--debug" not in sys.argv:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        warnings.simplefilter("ignore")
        _log_errors_once()
    prepare_streams()
    if sys.argv[1:2] and sys.argv[1] in KEEPING:
        gc.disable()
    # The interpreter ends by looking for cycles among all objects, which takes a second after PyTorch was loaded.
    atexit.register(gc.freeze)
    cli()


def _log_errors_once() -> None:
    handler = logging.StreamHandler()
    handler.addFilter(_has_no_handler_of_its_own)
    logging.basicConfig(level=logging.ERROR, handlers=[handler])


def _has_no_handler_of_its_own(record: logging.LogRecord) -> bool:
    """Whether the library of a record leaves showing it to us: huggingface_hub shows its records and passes them on."""
    return not logging.getLogger(record.name.partition(".")[0]).handlers
