#!/usr/bin/env bash
# s3fs 2026.9.0 with fsspec 2026.9.0: `cat_file(path, start=3, end=3)` of an object in S3 returns the whole object, and so
# does an empty range among those of `cat_ranges`, without an error. The same calls give b"" of fsspec's memory and local
# file systems. s3fs sends the header `Range: bytes=3-2`, whose end is before its start; HTTP lets a server take no notice
# of such a header, and answer with everything. Seen on Linux, Python 3.11, against the server of moto 5.2.5.
#
# Expected by a reader of fsspec's documentation: `start` and `end` are "bytes limits of the read", as of a slice, so an
# empty slice is empty, whatever the store; one that is computed, such as the rows of nobody, may be empty.
#
#     memory: b'34' b'' [b'', b'45']
#     file: b'34' b'' [b'', b'45']
#     s3: b'34' b'0123456789' [b'0123456789', b'45']
#     headers that s3fs sent: ['bytes=3-4', 'bytes=3-2', 'bytes=0--1', 'bytes=4-5']
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    s3fs==2026.9.0 fsspec==2026.9.0 aiobotocore==3.10.0 botocore==1.43.117 'moto[server]==5.2.5'
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import logging
import os
import socket
import warnings

with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
warnings.simplefilter("ignore")
logging.getLogger("werkzeug").setLevel(logging.ERROR)

import fsspec
import s3fs
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
server.start()
s3 = fsspec.filesystem("s3")
s3.mkdir("bucket")
sent = []
s3.s3.meta.events.register("before-sign.s3.GetObject", lambda request, **_: sent.append(request.headers.get("Range")))


def read(files, path):
    """The object's bytes from 3 to 5, and from 3 to 3; and the ranges 0 to 0 and 4 to 6 of it together."""
    files.pipe_file(path, b"0123456789")
    return files.cat_file(path, start=3, end=5), files.cat_file(path, start=3, end=3), files.cat_ranges([path] * 2, [0, 4], [0, 6])


found = {
    "memory": read(fsspec.filesystem("memory"), "/folder/object"),
    "file": read(fsspec.filesystem("file"), os.path.abspath("object")),
    "s3": read(s3, "bucket/object"),
}
server.stop()
print("s3fs", s3fs.__version__, "fsspec", fsspec.__version__)
for kind, result in found.items():
    print(f"{kind}:", *result)
print("headers that s3fs sent:", sent)
plain = (b"34", b"", [b"", b"45"])
assert found["memory"] == found["file"] == plain, "the behaviour changed"
assert found["s3"] == (b"34", b"0123456789", [b"0123456789", b"45"]), "the behaviour changed"
assert "bytes=3-2" in [value.decode() if isinstance(value, bytes) else value for value in sent], "the behaviour changed"
PYTHON
