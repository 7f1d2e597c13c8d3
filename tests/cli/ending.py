"""Ends writers by signals: run as a script, which imports everything once and forks a process for each command.

    python -m tests.cli.ending FOLDER < jobs.json

`FOLDER` holds what the commands read. Each job is a command, a signal and a moment: a number of seconds, or
"written", when the output is whole in its temporary folder and not yet in its place. Prints how each ended.
"""

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

WARM = (
    "exporters.onnx.export",
    "exporters.onnx_adapter.adapter_file",
    "exporters.peft.lora_folder",
    "qrlora_deploy.bench.run",
    "qrlora_deploy.cli.group",
    "qrlora_deploy.inspection.plots",
    "qrlora_deploy.runtime.customers.packed_writer",
    "qrlora_deploy.training.fleet.run",
    "qrlora_deploy.training.trainer",
    "qrlora_deploy.training.warmup",
)


def end_when_written(number: int) -> None:
    """Send this process a signal in the middle of its first write."""
    from qrlora_deploy.io import files

    def settle(place: Any) -> None:
        files._settle = original
        os.kill(os.getpid(), number)
        original(place)

    original: Callable[[Any], None] = files._settle
    files._settle = settle


def command(arguments: list[str], before: Callable[[], None]) -> int:
    """Fork, and run a command in the child; returns its process."""
    child = os.fork()
    if child:
        return child
    code = 99
    # A shell's background job ignores it, and so would everything that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        from qrlora_deploy.cli.group import cli

        with open(os.devnull, "w") as sink:  # noqa: PTH123 - a name of the system
            # The files themselves: what a library started must not hold the pipes of a process that has gone.
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            sys.stdout = sys.stderr = sink
            before()
            cli.main(arguments, prog_name="qrlora-deploy")
    except SystemExit as error:
        code = int(str(error.code))
    finally:
        # As the interpreter does at its end, which is left out here: threads finish what they write.
        threading._shutdown()  # type: ignore[attr-defined]
        os._exit(code)


def run(arguments: list[str], number: int, moment: float | str) -> tuple[int, float]:
    """Run a command and end it; its exit code, as Popen counts it, and its seconds."""
    start = time.monotonic()
    child = command(arguments, lambda: end_when_written(number) if moment == "written" else None)
    if isinstance(moment, float):
        time.sleep(moment)
        with suppress(ProcessLookupError):
            os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - start


def names(folder: str) -> list[str]:
    """Everything in a folder, hidden or not."""
    return sorted(
        os.path.relpath(os.path.join(place, name), folder)  # noqa: PTH118
        for place, folders, files in os.walk(folder)
        for name in folders + files
    )


def main() -> None:
    """Do all jobs in order."""
    os.chdir(sys.argv[1])
    for module in WARM:
        importlib.import_module(module)
    ended = []
    for arguments, name, moment, output in json.load(sys.stdin):
        number = 0 if name is None else getattr(signal, name)
        code, seconds = run(arguments, number, moment)
        ended.append({"code": code, "seconds": seconds, "left": names(output)})
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
