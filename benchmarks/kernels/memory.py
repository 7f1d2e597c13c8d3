"""The memory of runs after the first, and captured graphs whose table has moved."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx.helper as helper
import onnxruntime

from benchmarks.kernels.trial import Place, Trial, graph, one_node
from qrlora_deploy.runtime.table.cuda import free_bytes

BLOCKS, WIDTH, WIDER = 4, 256, 1024
SHAPES = 20
LEAST = 2**20
"""Bytes that are more than noise."""


def _used_bytes(place: Place) -> int:
    if place.provider == "cuda":
        return -free_bytes()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return 4096 * pages


def later_runs(pattern: bool) -> Callable[[Place], str]:
    """What the second run of a shape takes, and then runs of twenty smaller shapes; with or without memory patterns."""

    def ask(place: Place) -> str:
        feeds = {"x": np.zeros((64, 128, WIDTH), np.float32)}
        feeds |= {f"a{block}": np.zeros((WIDTH, WIDER), np.float32) for block in range(BLOCKS)}
        feeds |= {f"b{block}": np.zeros((WIDER, WIDTH), np.float32) for block in range(BLOCKS)}
        nodes, last = [], "x"
        for block in range(BLOCKS):
            nodes.append(helper.make_node("MatMul", [last, f"a{block}"], [f"wide{block}"]))
            nodes.append(helper.make_node("Gelu", [f"wide{block}"], [f"grown{block}"]))
            nodes.append(helper.make_node("MatMul", [f"grown{block}", f"b{block}"], [f"y{block}"]))
            last = f"y{block}"
        options = onnxruntime.SessionOptions()
        options.enable_mem_pattern = pattern
        session = place.open(graph(nodes, feeds, [last]), options)
        used = [_used_bytes(place)]
        shapes = [(64, 128), (64, 128)] + [(64 - count, 128 - count) for count in range(1, SHAPES + 1)]
        for rows, length in shapes:
            session.run(None, feeds | {"x": feeds["x"][:rows, :length].copy()})
            used.append(_used_bytes(place))
        second, others = used[2] - used[1], used[-1] - used[2]
        word = "more" if second > LEAST else "no more"
        return f"{word} ({_mb(used[1] - used[0])}, then {_mb(second)}, {SHAPES} smaller shapes {_mb(others)} MB)"

    return ask


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f}"


def moved_table(same_graph: bool) -> Callable[[Place], str]:
    """A captured look-up whose table is bound to another place, by the same number of the graph or by a new one."""

    def ask(place: Place) -> str:
        captured = Place(place.provider, graphs=True)
        old = np.full((4, 256), 1, np.float32)
        new = np.full((8, 256), 2, np.float32)
        slot = np.array([1, 3], dtype=np.int64)
        session = captured.open(one_node("Gather", {"table": old, "slot": slot}))
        # Both tables stay where they are to the end: a graph may still read the first one.
        tables = [onnxruntime.OrtValue.ortvalue_from_numpy(table, "cuda", 0) for table in (old, new)]
        slots = onnxruntime.OrtValue.ortvalue_from_numpy(slot, "cuda", 0)
        output = onnxruntime.OrtValue.ortvalue_from_shape_and_type([2, 256], np.float32, "cuda", 0)
        for table, number in zip(tables, ("1", "1" if same_graph else "2"), strict=True):
            binding, options = session.io_binding(), onnxruntime.RunOptions()
            options.add_run_config_entry("gpu_graph_id", number)
            binding.bind_ortvalue_input("table", table)
            binding.bind_ortvalue_input("slot", slots)
            binding.bind_ortvalue_output("y", output)
            for _ in range(2):
                session.run_with_iobinding(binding, options)
        found = output.numpy()
        return {1.0: "the old table", 2.0: "the new table"}.get(float(found.mean()), "something else")

    return ask


def trials() -> list[Trial]:
    """The questions; every guess was written before its first run."""
    named = "three products with GELU"
    return [
        Trial(named, "memory of later runs, patterns", {"cpu": "more", "cuda": "more"}, later_runs(True)),
        Trial(named, "memory of later runs, no patterns", {"cpu": "no more", "cuda": "no more"}, later_runs(False)),
        Trial("captured Gather", "a table bound elsewhere, same graph", {"cuda": "the old table"}, moved_table(True)),
        Trial("captured Gather", "a table bound elsewhere, new graph", {"cuda": "the new table"}, moved_table(False)),
    ]
