"""What Triton is told of the two models: their inputs and outputs, how it batches, refuses and warms up."""

from collections.abc import Mapping
from typing import Any

from exporters.triton.config_text import Message, Word, entries
from exporters.triton.options import TritonOptions
from qrlora_deploy.runtime.bundle.bundle import MODEL_FILE, Manifest, TensorRecord
from qrlora_deploy.serving.triton.tensors import front_inputs, front_outputs

TYPES = {
    "int64": "TYPE_INT64",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "BYTES": "TYPE_STRING",
    "FP32": "TYPE_FP32",
}

KINDS = {"cpu": "KIND_CPU", "cuda": "KIND_GPU"}

SHORTEST = 16
"""Tokens of the shortest length that rows are padded to."""


def lengths_of(max_length: int) -> tuple[int, ...]:
    """Lengths that rows are padded to, so that requests have equal shapes: doubled up to what the model takes."""
    found = []
    length = SHORTEST
    while length < max_length:
        found.append(length)
        length *= 2
    return (*found, max_length)


def graph_config(manifest: Manifest, options: TritonOptions, warm_up: Mapping[str, int]) -> dict[str, Any]:
    """The configuration of the model that runs the graph.

    Args:
        manifest: of the graph.
        options: of the export.
        warm_up: for each input the tokens of the row that it is warmed up with; the row's numbers are in files.
    """
    return {
        "name": options.graph_name,
        "backend": "onnxruntime",
        "default_model_filename": MODEL_FILE,
        "max_batch_size": options.max_batch,
        "input": [_tensor(record) for record in manifest.inputs],
        "output": [_tensor(record) for record in manifest.outputs],
        **_scheduling(options, options.instances, KINDS[options.provider]),
        "model_warmup": [_warm_up(manifest, rows, warm_up) for rows in dict.fromkeys((1, options.max_batch))],
    }


def front_config(manifest: Manifest, options: TritonOptions) -> dict[str, Any]:
    """The configuration of the model that takes texts."""
    parameters = {
        "graph": options.graph_name,
        "customers": options.customers,
        "packed": options.packed,
        "poll": "false",
        "max_customers": "0",
        "lengths": ",".join(map(str, lengths_of(manifest.max_length))),
    }
    return {
        "name": options.name,
        "backend": "python",
        "max_batch_size": options.max_batch,
        "input": [
            {"name": name, "data_type": Word(TYPES["BYTES"]), "dims": [1]} | ({"optional": True} if optional else {})
            for name, optional in front_inputs(manifest).items()
        ],
        "output": [
            {"name": name, "data_type": Word(TYPES[datatype]), "dims": [columns]}
            for name, (datatype, columns) in front_outputs(manifest).items()
        ],
        **_scheduling(options, options.fronts, "KIND_CPU"),
        "parameters": entries({name: {"string_value": value} for name, value in parameters.items()}),
    }


def _tensor(record: TensorRecord) -> dict[str, Any]:
    """Without the batch axis, which `max_batch_size` stands for; an axis with a name may have any size."""
    dims = [axis if isinstance(axis, int) else -1 for axis in record.shape[1:]]
    return {"name": record.name, "data_type": Word(TYPES[record.dtype]), "dims": dims}


def _scheduling(options: TritonOptions, instances: int, kind: str) -> dict[str, Message]:
    policy: dict[str, Any] = {"max_queue_size": options.max_queue}
    if options.queue_timeout_ms:
        policy |= {
            "timeout_action": Word("REJECT"),
            "default_timeout_microseconds": options.queue_timeout_ms * 1000,
            "allow_timeout_override": True,
        }
    delay = {"max_queue_delay_microseconds": options.queue_delay_us} if options.queue_delay_us else {}
    return {
        "version_policy": {"latest": {"num_versions": 1}},
        "dynamic_batching": {**delay, "default_queue_policy": policy},
        "instance_group": {"count": instances, "kind": Word(kind)},
    }


def _warm_up(manifest: Manifest, rows: int, warm_up: Mapping[str, int]) -> dict[str, Any]:
    inputs = {
        record.name: {
            "data_type": Word(TYPES[record.dtype]),
            "dims": [axis if isinstance(axis, int) else warm_up[record.name] for axis in record.shape[1:]],
            "input_data_file": record.name,
        }
        for record in manifest.inputs
    }
    return {"name": f"{rows} rows", "batch_size": rows, "inputs": entries(inputs)}
