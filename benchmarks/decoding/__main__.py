"""How long a token takes: exported graphs with a customer in each row, PyTorch's ways and PEFT beside them.

    python -m benchmarks.decoding --out FILE                              on a GPU, about ten minutes
    python -m benchmarks.decoding --parts one_thread --device cpu --out FILE
    python -m benchmarks.decoding --quick --device cpu                    a small shape, to see that everything runs

Models have random weights of known shapes, made on the spot; graphs are built by the exporter's own code, fp16 on CUDA
and fp32 on the CPU. Before anything is timed each graph is held against PyTorch in fp32, on rows of different lengths
with another customer in each, behind their prompts and forced tokens, and the likeliest token must be the same wherever
the two best are apart. Contenders take turns in a random order, round by round; figures are medians.

Parts: `steps` (a token of each graph, of eager `generate`, of a static cache captured as a CUDA graph, of
torch.compile), `resident` (10,000 customers by 10), `kernels` (what runs on the GPU for a token), `peft` (as many
customers as rows), `batching` (continuous by static batches through `GenerationSession`), `drawing` (rows that
draw on the GPU by rows for which the host does), `one_thread` (4 bits on a CPU by eager fp32).

What is expected on an H100: an operator takes 2.3 us within a CUDA graph, measured, besides its bytes at 3 TB/s. A
branch is three operators more (R, the coefficients, and one that puts `c * (x R)` beside the input), two where its
input or output is narrow (`exporters.onnx.decoder.products.MOST_KEPT`). So q and v take 7 us a layer and all linear
layers 28 us of operators in Llama-3.2-1B's shape, besides 1 and 7 us of bytes; 4.6 and 18 us in SmolLM2-135M's. Fewer
than two operators a branch takes one that computes `c * (x R)` by itself, which ONNX Runtime does not have.
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.measuring import environment
from benchmarks.decoding.aims import LARGE, SMALL, lines_of, table
from benchmarks.decoding.batching import Chats, measure_batching
from benchmarks.decoding.bench import Settings, prepare
from benchmarks.decoding.drawing import measure_drawing
from benchmarks.decoding.kernels import measure_kernels
from benchmarks.decoding.one_thread import measure_one_thread
from benchmarks.decoding.shapes import SHAPES
from benchmarks.decoding.steps import measure_peft, measure_resident, measure_steps
from qrlora_deploy.io.files import write_json

ON_A_SHAPE = {
    "steps": measure_steps,
    "resident": measure_resident,
    "kernels": measure_kernels,
    "peft": measure_peft,
}
"""PEFT comes last: it changes the model."""

BOTH_SHAPES = ("steps", "kernels")

PARTS = (*ON_A_SHAPE, "batching", "drawing", "one_thread")
TINY = "tiny"


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the parts; the record is written behind each of them."""
    record: dict[str, Any] = {
        "prompt": arguments.prompt,
        "new": arguments.new,
        "rounds": arguments.rounds,
        "shapes": {},
        "environment": environment(arguments.device),
    }
    for name in arguments.shapes:
        if set(arguments.parts) & set(ON_A_SHAPE):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                _measure_shape(arguments, name, Path(place), record)
    quick = arguments.quick
    if "batching" in arguments.parts:
        chats = Chats(12, 4, 32) if quick else Chats(256, 32)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            shape = TINY if quick else SMALL
            record["batching"] = measure_batching(Path(place), shape, arguments.device, chats, 1 if quick else 2)
        _save(arguments, record)
    if "drawing" in arguments.parts:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            sizes = (4, 6, 1) if quick else (64, arguments.new, min(3, arguments.rounds))
            record["drawing"] = measure_drawing(Path(place), TINY if quick else SMALL, arguments.device, *sizes)
        _save(arguments, record)
    if "one_thread" in arguments.parts:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            sizes = (8, 8, 2) if quick else (128, 32, arguments.rounds)
            record["one_thread"] = measure_one_thread(Path(place), TINY if quick else SMALL, *sizes)
    return record


def _measure_shape(arguments: argparse.Namespace, name: str, folder: Path, record: dict[str, Any]) -> None:
    settings = Settings(
        arguments.device,
        arguments.rounds,
        tuple(arguments.batches),
        arguments.prompt,
        arguments.new,
        tuple(arguments.compile if name in (LARGE, TINY) else ()),
        arguments.deadline,
    )
    bench = prepare(folder, name, settings)
    found = record["shapes"][name] = {
        "layers": bench.layers,
        "weight_bytes": bench.weight_bytes,
        "floor_ms": bench.floor_ms,
        "checks": bench.checks,
        "operators": {graph: made.operators for graph, made in bench.graphs.items()},
    }
    for part, run in ON_A_SHAPE.items():
        if part in arguments.parts and (part in BOTH_SHAPES or name in (LARGE, TINY)):
            found[part] = run(bench)
            _save(arguments, record)
            gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()


def _save(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    if arguments.out:
        write_json(arguments.out, record)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=[LARGE, SMALL])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 8])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens that are written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", type=int, nargs="*", default=[1, 64], help="batches of the large shape")
    parser.add_argument("--budget-seconds", type=float, help="torch.compile is left out where it would take longer")
    parser.add_argument("--folder", type=Path, help="for models and graphs, 10 GB; default: the system's")
    parser.add_argument("--quick", action="store_true", help="a small shape and few runs")
    parser.add_argument("--out", type=Path)
    found = parser.parse_args()
    if found.quick:
        found.shapes, found.prompt, found.new, found.rounds = [TINY], 16, 8, 2
        found.batches, found.compile = [1, 3], [3]
    if found.device == "cpu" and not found.quick and found.parts != ["one_thread"]:
        parser.error("--device cpu is for --quick and for --parts one_thread: the other figures are those of a GPU")
    found.parts = found.parts or [part for part in PARTS if part != "kernels" or found.device == "cuda"]
    found.deadline = None if found.budget_seconds is None else time.perf_counter() + found.budget_seconds
    return found


def main() -> None:
    """Parse, run, report."""
    arguments = _parse()
    torch.backends.cuda.matmul.allow_tf32 = False
    if arguments.device == "cuda":
        # Not the default one, on which nothing can be captured.
        torch.cuda.set_stream(torch.cuda.Stream())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        record = measure(arguments, Path(folder))
    _save(arguments, record)
    print(table(lines_of(record)))


if __name__ == "__main__":
    main()
