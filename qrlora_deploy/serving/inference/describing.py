"""What a server says of itself and its models, in the protocol's and in Triton's shapes."""

from typing import Any

from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.inference.questions import IDS, INPUTS, TEXT
from qrlora_deploy.serving.outputs import DATATYPES, outputs_of
from qrlora_deploy.serving.served import VERSION, Models, ServedModel
from qrlora_deploy.version import __version__

PLATFORM = "onnxruntime_onnx"

EXTENSIONS = ("binary_tensor_data", "statistics", "model_configuration")
"""Of the protocol, that this server has whole."""

CONFIG_TYPES = {"BYTES": "TYPE_STRING", "INT64": "TYPE_INT64", "FP32": "TYPE_FP32"}

MATRICES = ("logits", "scores", "labels", "embeddings")

DYNAMIC = -1
"""A size that is any."""


def server_metadata() -> dict[str, Any]:
    """Of `GET /v2`."""
    return {"name": "qrlora-deploy", "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(model: ServedModel) -> dict[str, Any]:
    """Of `GET /v2/models/{name}`."""
    manifest = model.bundle.manifest
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [_tensor(name, datatype, name in IDS) for name, datatype in inputs_of(model).items()],
        "outputs": [_tensor(name, DATATYPES[name], name in MATRICES) for name in outputs_of(model.task)],
        "parameters": {"task": manifest.task, "max_length": manifest.max_length, "base_digest": manifest.base_digest},
    }


def inputs_of(model: ServedModel) -> dict[str, str]:
    """The inputs that a model's requests may have, with their datatypes."""
    graph = {record.name for record in model.bundle.manifest.inputs}
    return {name: datatype for name, datatype in INPUTS.items() if name not in IDS or name in graph}


def _tensor(name: str, datatype: str, is_matrix: bool) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [DYNAMIC] * (2 if is_matrix else 1)}


def model_config(model: ServedModel) -> dict[str, Any]:
    """Of `GET /v2/models/{name}/config`, as Triton's model configuration is in JSON.

    `max_batch_size` is 0: the number of rows is a size of the tensors. Everything but `text` is optional.
    """
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0,
        "input": [
            _config(name, datatype, name in IDS) | {"optional": name != TEXT, "format": "FORMAT_NONE"}
            for name, datatype in inputs_of(model).items()
        ],
        "output": [_config(name, DATATYPES[name], name in MATRICES) for name in outputs_of(model.task)],
        "parameters": {},
    }


def _config(name: str, datatype: str, is_matrix: bool) -> dict[str, Any]:
    return {"name": name, "data_type": CONFIG_TYPES[datatype], "dims": [DYNAMIC] * (2 if is_matrix else 1)}


def model_stats(model: ServedModel) -> dict[str, Any]:
    """One of `GET /v2/models/{name}/stats`, in Triton's shape, where a row is what Triton calls an inference."""
    stats = model.engine.stats()
    nothing = {"count": 0, "ns": 0}
    return {
        "name": model.name,
        "version": VERSION,
        "last_inference": round(stats.last_run_s * 1000),
        "inference_count": stats.rows,
        "execution_count": stats.batches,
        "inference_stats": {
            "success": _duration(stats.rows, stats.queue_s + stats.run_s),
            "fail": _duration(_refused(stats), 0.0),
            "queue": _duration(stats.rows, stats.queue_s),
            # Triton's tools stop where the three have different counts.
            "compute_input": _duration(stats.batches, 0.0),
            "compute_infer": _duration(stats.batches, stats.run_s),
            "compute_output": _duration(stats.batches, 0.0),
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [],
    }


def _refused(stats: EngineStats) -> int:
    return sum(count for _, count in stats.rejected)


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(seconds * 1e9)}


def repository_index(models: Models, is_ready: bool) -> list[dict[str, str]]:
    """Of `POST /v2/repository/index`."""
    return [
        {
            "name": model.name,
            "version": VERSION,
            "state": "READY" if is_ready and model.ready else "UNAVAILABLE",
            "reason": "" if is_ready and model.ready else "the server starts or ends",
        }
        for model in models
    ]
