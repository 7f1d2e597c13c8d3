"""Takes from the records the figures that `doctor --plan` goes by: `python -m benchmarks.planning_figures`.

It writes `qrlora_deploy/inspection/recorded.json`, which is installed; the records are not. Run it when a record that
it names was measured anew.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.shapes import SHAPES, random_classifier
from qrlora_deploy.inspection.recorded import FILE, Recorded
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.targets import choose_targets

RESULTS = Path(__file__).parent / "results"

MIXED = (
    "gpu_h100/mixed-fp16.json",
    "gpu_h100/mixed-fp32.json",
    "gpu_h100/mixed-sessions.json",
    "mixed_batch_cpu.json",
)
"""Records of `benchmarks.mixed_batch`."""

SHAPE_OF = {"roberta-base": "roberta", "minilm": "minilm"}
"""Key of `SHAPES` by the name that these records have for a model."""

GLUE = "glue/runs.jsonl"
BASES = {"mpnet": "all-mpnet-base-v2", "minilm": "all-MiniLM-L6-v2"}
"""Of the GLUE runs."""

QUICKSTART = "quickstart_h200.json"


def figures() -> dict[str, Any]:
    """What is written, as plain JSON values."""
    rates = [rate for name in MIXED for rate in _rates(name)]
    return {"rates": rates, "ranks": [_ranks(base) for base in BASES], "customer_file": _customer_file()}


def _rates(name: str) -> list[dict[str, Any]]:
    record = json.loads((RESULTS / name).read_text("utf-8"))
    environment = record["environment"]
    common = {
        "device": f"{environment['cpus']} CPU cores" if record["provider"] == "cpu" else environment["device"],
        "model": record["model"],
        "block_weights": sum(math.prod(shape) for shape in _shapes(SHAPE_OF[record["model"]])),
        "coefficients": record["total_rank"],
        "precision": record["precision"],
        "cuda_graph": record["cuda_graph"],
        "date": environment["date"],
        "record": name,
    }
    return [
        common
        | {
            "batch": shape["batch"],
            "length": shape["length"],
            "rows_per_s": round(shape["batch"] / shape["latency_ms"]["switchable, all different"]["p50"] * 1e3, 1),
        }
        for shape in record["shapes"]
    ]


def _ranks(base: str) -> dict[str, Any]:
    """From the first GLUE run that adapted all layers of `base` by tau 0.5 and trained nothing else."""
    lines = (json.loads(line) for line in (RESULTS / GLUE).read_text("utf-8").splitlines())
    run = next(line for line in lines if (line["model"], line["method"], line["start"]) == (base, "qr-all", "warmed"))
    return {
        "model": BASES[base],
        "coefficients": run["trainable_parameters"],
        "directions": sum(min(shape) for shape in _shapes(base)),
        "date": run["finished"][:10],
        "record": GLUE,
    }


def _customer_file() -> dict[str, Any]:
    record = json.loads((RESULTS / QUICKSTART).read_text("utf-8"))
    report = record["report"]
    return {
        "size_bytes": report["sizes"]["one customer"],
        "coefficients": report["coefficients"],
        "date": record["date"],
        "record": QUICKSTART,
    }


def _shapes(name: str) -> list[tuple[int, ...]]:
    """Of the linear layers in the blocks of a model of `SHAPES`."""
    with torch.device("meta"):
        model = random_classifier(*SHAPES[name])
    return [tuple(model.get_parameter(f"{target}.weight").shape) for target in choose_targets(model)]


def main() -> None:
    """Make the file, after a look at what it would be read as."""
    found = figures()
    Recorded.model_validate(found, strict=True)
    write_json(FILE, found)
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
