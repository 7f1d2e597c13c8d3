"""A process of a server, as its supervisor starts it: `python -m qrlora_deploy.serving.processes.child`."""

import logging
import signal
import sys
from collections.abc import Sequence

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.serving.json_log import log_as_json, log_plainly
from qrlora_deploy.serving.processes.control import Control
from qrlora_deploy.serving.processes.engine_process import run_engine
from qrlora_deploy.serving.processes.front_process import run_front
from qrlora_deploy.serving.processes.options import ENGINE, ChildOptions

IGNORED = ("SIGINT", "SIGTERM", "SIGHUP")
"""Whoever signals the whole group means the supervisor, which tells each process what to do."""

logger = logging.getLogger("qrlora_deploy.serving.processes")


def main(arguments: Sequence[str]) -> int:
    """Be what the arguments say until the supervisor ends it; the exit code."""
    for name in IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    descriptor, text = arguments
    control, options = Control(int(descriptor)), ChildOptions.of_text(text)
    (log_as_json if options.log_json else log_plainly)()
    try:
        (run_engine if options.role == ENGINE else run_front)(options, control)
    except QrloraError as error:
        control.failed(error)
        return error.exit_code
    except Exception as error:
        logger.exception("%s failed", options.name)
        control.failed(QrloraError(f"{options.name} failed: {error!r}"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
