#!/usr/bin/env bash
# watchfiles 1.3.0, force_polling=True: a file that is overwritten in place by an older one with its time (`cp -p` of
# yesterday's version: a rollback) is never reported, although its content, size and time are others. The same
# overwriting with a newer time is reported at once, and so is the next `touch`. Seen on Linux, Python 3.11.
#
# Expected by a reader of its documentation: polling compares files again and again and tells any change.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check watchfiles==1.3.0 anyio==4.16.0
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import os, pathlib, shutil, threading, time
import watchfiles

folder = pathlib.Path("folder")
folder.mkdir()
file, yesterday = folder / "customer", pathlib.Path("yesterday")
file.write_text("version 2")
yesterday.write_text("version 1, of another length")
os.utime(yesterday, (time.time() - 86400,) * 2)
seen, stop = [], threading.Event()

def watch():
    for changes in watchfiles.watch(folder, force_polling=True, poll_delay_ms=100, rust_timeout=200,
                                    yield_on_timeout=True, stop_event=stop):
        if changes:
            seen.append(changes)

def told(change) -> bool:
    time.sleep(2)  # the poller has looked at the folder several times
    before = len(seen)
    change()
    time.sleep(4)
    return len(seen) > before

thread = threading.Thread(target=watch)
thread.start()
found = {
    "overwritten, newer": told(lambda: file.write_text("version 3")),
    "overwritten, older": told(lambda: shutil.copy2(yesterday, file)),
    "touched": told(file.touch),
}
stop.set()
thread.join()
print("watchfiles", watchfiles.__version__, "reports a file that is:", found)
assert file.read_text() == "version 1, of another length"
assert found == {"overwritten, newer": True, "overwritten, older": False, "touched": True}, "the behaviour changed"
PYTHON
