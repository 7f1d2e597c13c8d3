"""The command line: `qrlora-deploy COMMAND`, one module per command."""

import io
import logging
import os
import sys
import warnings

from qrlora_deploy.cli.group import cli

QUIET = {
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Read by the libraries when they are imported; a variable that the user has set wins."""


def main() -> None:
    """Entry point of the console script: stderr carries our progress and one line per error."""
    if "--debug" not in sys.argv:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        warnings.simplefilter("ignore")
        logging.basicConfig(level=logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        # Names of files need not be text; what the stream cannot show is written as an escape.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    cli()
