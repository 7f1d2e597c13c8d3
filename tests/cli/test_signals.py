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
    assert shown.out == "" and shown.err.strip() == "Interrupted"


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


def interrupted(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the last line of a command that is interrupted."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments, prog_name="qrlora-deploy")
    return int(caught.value.code or 0), capsys.readouterr().err.splitlines()[-1]


def test_the_last_line_says_what_was_kept(
    tmp_path: Path,
    tiny_base: Path,
    tiny_basis_file: Path,
    tiny_customer_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qrlora_deploy.api.merging.merge", end)
    merge = ["merge", str(tiny_base), "--basis", str(tiny_basis_file), "--coefficients", str(tiny_customer_file)]
    assert interrupted([*merge, "-o", "out"], capsys) == (143, "Interrupted; out was not written")

    def end_later(*arguments: object, **_: object) -> None:
        folder = Path(str(arguments[5])) / "checkpoint-1"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        end()

    (tmp_path / "good.tsv").write_text("text\tlabel\nplay music\thome\n")
    train = ["train", str(tiny_base), "--basis", str(tiny_basis_file), "--data", "good.tsv", "-o", "acme.safetensors"]
    monkeypatch.setattr("qrlora_deploy.training.trainer.train", end)
    assert interrupted(train, capsys) == (143, "Interrupted; acme.safetensors was not written")
    monkeypatch.setattr("qrlora_deploy.training.trainer.train", end_later)
    kept = "Interrupted; .acme.safetensors.work is kept: the same command goes on by --resume"
    assert interrupted(train, capsys) == (143, kept)
    monkeypatch.setattr("qrlora_deploy.training.fleet.run.train_fleet", end)
    (tmp_path / "customers").mkdir()
    (tmp_path / "customers" / "bolt.safetensors").touch()
    fleet = ["train-fleet", str(tiny_base), "--basis", str(tiny_basis_file), "--data", "good.tsv", "-o", "customers"]
    code, line = interrupted(fleet, capsys)
    assert code == 143
    assert line == "Interrupted; 1 customer is in customers: the same command trains the others by --resume"


def test_what_a_library_says_after_a_signal_is_no_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def examine(_progress: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("the reader was closed") from None

    monkeypatch.setattr("qrlora_deploy.inspection.doctor.examine", examine)
    assert interrupted(["doctor"], capsys) == (143, "Interrupted")


def test_a_forked_child_leaves_its_parents_folders(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from qrlora_deploy.io.temporary import remove_live, temporary_folder\n"
        "with temporary_folder(Path(sys.argv[1]), 'out') as folder:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        remove_live()\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "    assert folder.is_dir()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment(), timeout=50, check=False)
    assert done.returncode == 0 and list(tmp_path.iterdir()) == []
