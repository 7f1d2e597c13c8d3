"""Runs a command until this process' input ends, and ends it with all that it started, whoever was killed.

    python -m benchmarks.server.peers.guarded COMMAND...

It has to be started as the leader of a session: LitServe's processes outlive their parent otherwise.
"""

import os
import signal
import subprocess
import sys
import threading

PATIENCE_S = 10.0


def main() -> int:
    """Its code."""
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_input, args=(process,), daemon=True).start()
    process.wait()
    # All that is left, this process too.
    os.killpg(0, signal.SIGKILL)
    return 0


def _end_with_input(process: subprocess.Popen[bytes]) -> None:
    sys.stdin.buffer.read()
    process.terminate()
    threading.Timer(PATIENCE_S, process.kill).start()


if __name__ == "__main__":
    sys.exit(main())
