"""The compiled schema: what the .proto says, and beside another copy of the same package."""

import subprocess
import sys

import pytest
from google.protobuf import descriptor_pool

from qrlora_deploy.serving.grpc.schema import METHODS, POOL, SERVICE, read_descriptors
from tests.serving.grpc.compile_proto import compiled

PUBLISHED = {
    "ModelInferRequest": {
        "model_name": 1,
        "model_version": 2,
        "id": 3,
        "parameters": 4,
        "inputs": 5,
        "outputs": 6,
        "raw_input_contents": 7,
    },
    "ModelInferRequest.InferInputTensor": {"name": 1, "datatype": 2, "shape": 3, "parameters": 4, "contents": 5},
    "ModelInferRequest.InferRequestedOutputTensor": {"name": 1, "parameters": 2},
    "ModelInferResponse": {
        "model_name": 1,
        "model_version": 2,
        "id": 3,
        "parameters": 4,
        "outputs": 5,
        "raw_output_contents": 6,
    },
    "ModelInferResponse.InferOutputTensor": {"name": 1, "datatype": 2, "shape": 3, "parameters": 4, "contents": 5},
    "InferParameter": {
        "bool_param": 1,
        "int64_param": 2,
        "string_param": 3,
        "double_param": 4,
        "uint64_param": 5,
    },
    "InferTensorContents": {
        "bool_contents": 1,
        "int_contents": 2,
        "int64_contents": 3,
        "uint_contents": 4,
        "uint64_contents": 5,
        "fp32_contents": 6,
        "fp64_contents": 7,
        "bytes_contents": 8,
    },
    "ModelMetadataResponse": {"name": 1, "versions": 2, "platform": 3, "inputs": 4, "outputs": 5},
    "ModelMetadataResponse.TensorMetadata": {"name": 1, "datatype": 2, "shape": 3},
    "ServerMetadataResponse": {"name": 1, "version": 2, "extensions": 3},
    "ModelReadyRequest": {"name": 1, "version": 2},
    "ModelMetadataRequest": {"name": 1, "version": 2},
}
"""Fields with their numbers, as kserve/open-inference-protocol has them at eeb043e2."""

OF_TRITON = {
    "ModelConfigRequest": {"name": 1, "version": 2},
    "ModelConfigResponse": {"config": 1},
    "ModelConfig": {
        "name": 1,
        "platform": 2,
        "version_policy": 3,
        "max_batch_size": 4,
        "input": 5,
        "output": 6,
        "parameters": 14,
        "backend": 17,
    },
    "ModelInput": {"name": 1, "data_type": 2, "format": 3, "dims": 4, "optional": 8},
    "ModelOutput": {"name": 1, "data_type": 2, "dims": 3},
    "ModelStatisticsRequest": {"name": 1, "version": 2},
    "ModelStatisticsResponse": {"model_stats": 1},
    "ModelStatistics": {
        "name": 1,
        "version": 2,
        "last_inference": 3,
        "inference_count": 4,
        "execution_count": 5,
        "inference_stats": 6,
        "batch_stats": 7,
    },
    "InferStatistics": {
        "success": 1,
        "fail": 2,
        "queue": 3,
        "compute_input": 4,
        "compute_infer": 5,
        "compute_output": 6,
        "cache_hit": 7,
        "cache_miss": 8,
    },
    "StatisticDuration": {"count": 1, "ns": 2},
}
"""The same of Triton's extensions, as tritonclient 2.73.0 has them."""

BESIDE_ANOTHER = """
from google.protobuf import descriptor_pb2, descriptor_pool
other = descriptor_pb2.FileDescriptorProto(name="grpc_service.proto", package="inference", syntax="proto3")
other.message_type.add(name="ModelInferRequest")
descriptor_pool.Default().Add(other)
from qrlora_deploy.serving.grpc.schema import ModelInferRequest
theirs = descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")
assert len(theirs.fields) == 0 and len(ModelInferRequest.DESCRIPTOR.fields) == 7
"""


def test_the_descriptor_is_that_of_the_proto() -> None:
    assert read_descriptors() == compiled()


def test_fields_have_the_published_numbers() -> None:
    for name, fields in (PUBLISHED | OF_TRITON).items():
        found = POOL.FindMessageTypeByName(f"inference.{name}")
        assert {field.name: field.number for field in found.fields} == fields, name


def test_methods_are_the_published_ones() -> None:
    names = ["ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"]
    assert list(METHODS) == [*names, "ModelConfig", "ModelStatistics"] and SERVICE == "inference.GRPCInferenceService"
    for name, classes in METHODS.items():
        full_names = [found.DESCRIPTOR.full_name for found in classes]
        assert full_names == [f"inference.{name}Request", f"inference.{name}Response"]


def test_another_copy_of_the_package_does_not_collide() -> None:
    subprocess.run([sys.executable, "-c", BESIDE_ANOTHER], check=True)
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindServiceByName(SERVICE)
