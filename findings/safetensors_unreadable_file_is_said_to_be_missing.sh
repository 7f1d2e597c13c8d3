#!/usr/bin/env bash
# safetensors 0.8.0: safe_open of a file that exists and may not be read raises FileNotFoundError, "No such file or
# directory", with errno None. A service that runs as another user than the one who wrote the weights is told that
# they are not there. Python's own open() raises PermissionError. Seen on Linux, Python 3.11.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
chmod 755 "$scratch"
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import os, pathlib
import numpy, safetensors, safetensors.numpy

file = pathlib.Path("weights.safetensors")
file.write_bytes(safetensors.numpy.save({"a": numpy.zeros(2, numpy.float32)}))
file.chmod(0)
if os.getuid() == 0:
    os.setuid(65534)  # root may read everything
try:
    open(file, "rb")
except OSError as error:
    plain = error
try:
    safetensors.safe_open(file, "np")
except Exception as error:
    found = error
print("open():     ", repr(plain))
print("safe_open():", repr(found), "errno", getattr(found, "errno", None))
assert file.exists() and isinstance(plain, PermissionError)
assert type(found) is FileNotFoundError and found.errno is None, "the behaviour changed"
PYTHON
