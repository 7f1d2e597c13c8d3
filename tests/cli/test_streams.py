"""A standard stream that was closed is none that takes anything: the work is done, and nobody is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import environment


def end(line: str, cwd: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a line of the shell in which `$CLI` is the command."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        capture_output=True,
        text=True,
        input=text,
        cwd=cwd,
        env=environment(CLI=f"{sys.executable} -m qrlora_deploy.cli"),
        timeout=240,
        check=False,
    )


@pytest.fixture
def place(tmp_path: Path, exported: Path, tiny_customer_file: Path) -> Path:
    (tmp_path / "bundle").symlink_to(exported)
    (tmp_path / "acme.safetensors").write_bytes(tiny_customer_file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "$CLI --help >&-",
        "$CLI train --help >&- 2>&- <&-",
        "$CLI inspect acme.safetensors >&-",
        "$CLI inspect acme.safetensors --json <&- >&-",
        "$CLI predict bundle --text hello >&-",
        "$CLI predict bundle --text hello --json >&- 2>&-",
        "$CLI predict bundle --repl <&-",
        "$CLI combine acme.safetensors:2 -o new.safetensors >&- <&-",
    ],
)
def test_a_closed_stream_is_no_error(place: Path, line: str) -> None:
    done = end(line, place)
    assert done.returncode == 0, done.stderr
    assert "rror" not in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert (place / "new.safetensors").is_file() == ("combine" in line)


@pytest.mark.parametrize("line", ["$CLI inspect nothing >&-", "$CLI inspect nothing <&-", "$CLI prdict 2>&-"])
def test_an_error_stays_one_with_a_stream_closed(place: Path, line: str) -> None:
    done = end(line, place)
    assert done.returncode == 2 and len(done.stderr.splitlines()) <= 1 and "internal" not in done.stderr


def test_what_a_library_prints_goes_into_no_file(place: Path) -> None:
    """Without its stream a file that is opened would get the stream's number, and with it what is printed there."""
    program = """
import os, sys
from qrlora_deploy.cli.streams import prepare_streams
prepare_streams()
with open("written", "w") as file:
    os.write(1, b"from below")
    os.write(2, b"from below")
    print("from above", flush=True)
    file.write("its own")
"""
    (place / "program.py").write_text(program)
    done = end(f"{sys.executable} program.py >&- 2>&- <&-", place)
    assert done.returncode == 0 and (place / "written").read_text() == "its own"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device_and_a_reader_that_has_gone(place: Path) -> None:
    full = end("$CLI inspect acme.safetensors > /dev/full", place)
    assert full.returncode == 1 and full.stderr == "Error: No space left on device\n"
    gone = end("$CLI inspect acme.safetensors --json | head -c 1 > /dev/null", place)
    assert gone.stderr == ""
