"""Compile the protocol's .proto into the descriptor that the package keeps.

python -m tests.serving.grpc.compile_proto
"""

import tempfile
from importlib.resources import files
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet

from qrlora_deploy.serving.grpc.schema import DESCRIPTOR_FILE

FOLDER = Path(str(files("qrlora_deploy.serving.grpc")))
PROTO = "open_inference.proto"


def compiled() -> FileDescriptorSet:
    """What protoc makes of the .proto now."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "compiled.bin"
        code = protoc.main(["protoc", f"-I{FOLDER}", f"--descriptor_set_out={output}", PROTO])
        if code:
            raise RuntimeError(f"protoc ended with {code}")
        return FileDescriptorSet.FromString(output.read_bytes())


if __name__ == "__main__":
    (FOLDER / DESCRIPTOR_FILE).write_bytes(compiled().SerializeToString(deterministic=True))
