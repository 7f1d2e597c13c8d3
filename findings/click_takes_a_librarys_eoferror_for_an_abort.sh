#!/usr/bin/env bash
# click 8.5.1: an EOFError that any library raises inside a command is taken for Ctrl-D at a prompt: the command ends
# with "Aborted!" and exit code 1, and neither the exception nor its place is shown. pickle raises EOFError at an
# empty file, such as a power loss leaves, and so does torch.load. Seen on Linux, Python 3.11.
#
# Expected: the traceback, as for every other exception (a ValueError at the same place has one).
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check click==8.5.1
cd "$scratch"
cat > command.py <<'PYTHON'
import pathlib, pickle, sys
import click

@click.command()
@click.argument("content")
def command(content):
    pathlib.Path("state.pkl").write_bytes(content.encode())
    with open("state.pkl", "rb") as file:
        pickle.load(file)

command()
PYTHON
set +e
"$scratch/venv/bin/python" command.py "" > empty 2>&1; empty=$?
"$scratch/venv/bin/python" command.py "junk" > junk 2>&1; junk=$?
set -e
echo "empty file: exit $empty, $(tr -d "\n" < empty)"
echo "junk:       exit $junk, $(tail -1 junk)"
[ "$(tr -d "\n" < empty)" = "Aborted!" ] && [ "$empty" = 1 ] && grep -q Traceback junk && ! grep -q EOFError empty \
    || { echo "the behaviour changed"; exit 1; }
