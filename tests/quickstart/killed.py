"""A quickstart that dies without a word at a step: `python -m tests.quickstart.killed OUT BASE STEP DONE [resume]`."""

import os
import signal
import sys
from pathlib import Path

from qrlora_deploy.quickstart import llm

ROWS = {"train_rows": 64, "held_out_rows": 4}


def main() -> None:
    """Kill this process when so much of the step is done."""
    out, base, step, count, *resume = sys.argv[1:]

    def die(what: str, done: int, total: int) -> None:
        if (what, done) == (step, int(count)):
            os.kill(os.getpid(), signal.SIGKILL)

    llm.run(Path(out), die, base=base, resume=bool(resume), **ROWS)


if __name__ == "__main__":
    main()
