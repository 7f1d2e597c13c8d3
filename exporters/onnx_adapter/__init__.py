"""A customer as a `.onnx_adapter` file, which ONNX Runtime lays over the inputs of a switchable graph by itself."""

from qrlora_deploy.deprecated.moved import names_of

__getattr__ = names_of("exporters.onnx_adapter.adapter_file")
