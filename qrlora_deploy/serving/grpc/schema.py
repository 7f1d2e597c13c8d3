"""The protocol's messages, made from its compiled descriptor in a pool of their own.

Other packages (tritonclient, kserve) bring the same protobuf package `inference`; a second copy of it in the pool that
all modules share raises "duplicate symbol". So nothing here is registered there.
"""

from importlib.resources import files
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool

DESCRIPTOR_FILE = "open_inference.bin"
"""A `FileDescriptorSet`; `python -m tests.serving.grpc.compile_proto` writes it."""

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"


def read_descriptors() -> FileDescriptorSet:
    """The compiled descriptor as it is in the package."""
    return FileDescriptorSet.FromString(files(__package__).joinpath(DESCRIPTOR_FILE).read_bytes())


def make_pool() -> DescriptorPool:
    """A new pool with the protocol in it and nothing else."""
    pool = DescriptorPool()
    for file in read_descriptors().file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = make_pool()

_SERVICE = POOL.FindServiceByName(SERVICE)


def message_class(name: str) -> Any:
    """The class of a message by its name within the protocol."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))


METHODS: dict[str, tuple[Any, Any]] = {
    method.name: (message_class(method.input_type.name), message_class(method.output_type.name))
    for method in _SERVICE.methods
}
"""The service's methods: the classes of what each takes and gives."""

ModelInferRequest = message_class("ModelInferRequest")
ModelInferResponse = message_class("ModelInferResponse")
