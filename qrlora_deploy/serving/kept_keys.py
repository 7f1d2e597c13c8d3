"""A copy of the file of keys that was read last, for processes that start while the file is missing or damaged."""

import logging
import os
import shutil
from pathlib import Path

from qrlora_deploy.errors import first_line
from qrlora_deploy.runtime.customers.polling import Signature, signature_of, status_of

_log = logging.getLogger(__name__)


def keep_copy(path: Path, kept: Path, seen: Signature | None) -> None:
    """Copy a file that was just read, unless it is another one by now, which is read soon.

    Args:
        path: the file.
        kept: place of the copy, in a folder that its owner alone may enter.
        seen: what told the file from others when it was read.
    """
    copy = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        shutil.copyfile(path, copy)
        if signature_of(status_of(path)) == seen:
            copy.replace(kept)
    except OSError as error:
        _log.warning("%s cannot be kept for processes that start later: %s", path, first_line(error))
