#!/usr/bin/env bash
# tritonclient 2.73.0 with protobuf 6.33.6, Linux, Python 3.11: its gRPC messages are of the package `inference`, the one that
# the Open Inference Protocol's own .proto file declares. Both can be imported by no process: the second one to come raises
# TypeError, although the files have other names and the messages the same fields where both know them. Whoever serves or
# asks by that protocol beside tritonclient needs a DescriptorPool of its own, in which the same file is taken.
#
# Expected: files of other names live beside each other, or the first one is taken.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'tritonclient[grpc]==2.73.0' protobuf==6.33.6
cd "$scratch"
cat > both.py <<'PYTHON'
from google.protobuf import descriptor_pb2, descriptor_pool
import tritonclient.grpc  # its messages go into the default pool

file = descriptor_pb2.FileDescriptorProto(name="open_inference_grpc.proto", package="inference", syntax="proto3")
message = file.message_type.add(name="ServerLiveRequest")
try:
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
    print("default pool: taken")
except TypeError as error:
    print("default pool: TypeError,", "duplicate" in str(error))
pool = descriptor_pool.DescriptorPool()
pool.AddSerializedFile(file.SerializeToString())
print("own pool: taken,", pool.FindMessageTypeByName("inference.ServerLiveRequest").full_name)
PYTHON
"$scratch/venv/bin/python" both.py | tee found
diff found - <<'EXPECTED' || { echo "the behaviour changed"; exit 1; }
default pool: TypeError, True
own pool: taken, inference.ServerLiveRequest
EXPECTED
