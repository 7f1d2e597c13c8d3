"""Signals in the command line: one exception, the code by convention, and no trace of the handlers afterwards."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qrlora_deploy.cli.group import cli
from qrlora_deploy.cli.signals import Terminated, raised_signals
from tests.cli.running import environment

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs SIGHUP")
ENDS = (signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_is_an_exception_and_a_second_one_too(number: signal.Signals) -> None:
    pipe = signal.set_wakeup_fd(-1)
    with raised_signals():
        for _ in range(2):
            with pytest.raises(Terminated) as caught:
                os.kill(os.getpid(), number)
            assert caught.value.code == 128 + number
    assert [signal.getsignal(end) for end in ENDS] == [signal.SIG_DFL] * 2
    assert signal.set_wakeup_fd(pipe) == -1
    assert "signals" not in [thread.name for thread in threading.enumerate()]


def test_handlers_of_others_stay() -> None:
    """As nohup ignores SIGHUP, and a server has a handler of its own."""
    heard: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with raised_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert heard == [1]


def test_nothing_happens_in_another_thread() -> None:
    found: list[object] = []

    def look() -> None:
        with raised_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_command_ends_with_the_signals_code(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qrlora_deploy.inspection.doctor.examine", lambda progress: os.kill(os.getpid(), number))
    # A shell's background job ignores it, and so would this process.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main(["doctor"], prog_name="qrlora-deploy")
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.value.code == code
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.strip() == ""


SWALLOWED = """
import os, signal, sys, time
from pathlib import Path
from qrlora_deploy.cli import signals
from qrlora_deploy.io.temporary import temporary_folder

signals.PATIENCE_S = 0.2
with signals.raised_signals(), temporary_folder(Path(sys.argv[1]), "out") as folder:
    (folder / "part").write_text("half")
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        pass
    time.sleep(60)
"""


def test_a_process_that_does_not_end_is_ended(tmp_path: Path) -> None:
    """Native code may hold the main thread, or something may swallow the exception."""
    done = subprocess.run([sys.executable, "-c", SWALLOWED, str(tmp_path)], env=environment(), timeout=50, check=False)
    assert done.returncode == 143 and list(tmp_path.iterdir()) == []


FORKED = """
import os, signal, time
from qrlora_deploy.cli import signals

signals.PATIENCE_S = 0.2
with signals.raised_signals():
    child = os.fork()
    if not child:
        time.sleep(60)
    time.sleep(0.1)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(0.5)
print("alive")
"""


def test_a_forked_child_does_not_speak_for_its_parent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED], env=environment(), timeout=50, check=False, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"alive\n"), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_outlives_the_command_holds_up_nobody() -> None:
    listening, speaking = os.pipe()
    with raised_signals():
        child = os.fork()
        if child == 0:
            os.read(listening, 1)
            os._exit(0)
    os.write(speaking, b"x")
    assert os.waitpid(child, 0)[1] == 0
    os.close(listening)
    os.close(speaking)
