"""The graphs that are compared, written from one model, each in a process of its own."""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.gpu_graph.one_pass import RowsWithOnes, join_by_products
from benchmarks.gpu_graph.optimizer import optimizer_graph
from benchmarks.gpu_graph.running import Graph
from benchmarks.gpu_graph.shapes import SIZES, make_basis, make_inputs, make_model
from benchmarks.gpu_graph.variants import ALL, fuse_projections
from exporters.onnx.attention import ATTEND
from exporters.onnx.branch_fusion import fuse_branches
from exporters.onnx.graph import write_graph
from exporters.onnx.joint_projections import join_projections
from exporters.onnx.precision import cast_inside
from exporters.onnx.switchable import make_switchable
from exporters.onnx.varlen import VarlenPacking
from qrlora_deploy.runtime.bundle.bundle import ALONE_FILE, MODEL_FILE, PACKED_FILE

OPTIMIZER = "transformers.optimizer"


def export_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Graph]:
    """Every graph by its name, exported in processes of their own."""
    made: dict[str, Graph] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        tasks = {
            name: pool.submit(_export, name, folder / str(number), arguments)
            for number, name in enumerate(arguments.variants)
        }
        for name, task in tasks.items():
            try:
                made[name] = Graph(*task.result())
            except Exception as error:  # one graph that cannot be made must not cost the others
                print(f"{name}: not exported: {type(error).__name__}: {str(error)[:300]}", flush=True)
    if arguments.device == "cpu" and SIZES[arguments.shape][0] == "Bert":
        names = tuple(make_inputs(arguments.shape, 1, 8))
        made[OPTIMIZER] = Graph(optimizer_graph(make_model(arguments.shape), names, folder), None)
    return made


def _export(name: str, place: Path, arguments: argparse.Namespace) -> tuple[Path, np.ndarray | None, bool, int | None]:
    """What `Graph` takes of one graph."""
    variant, model = ALL[name], make_model(arguments.shape)
    place.mkdir()
    rows = table = None
    if variant.setup is not None:
        rows = make_switchable(model, make_basis(model, variant.setup), layout=variant.layout)
        most = max(batch for batch, _length in arguments.batches)
        table = (
            np.random.default_rng(3).normal(0, variant.setup.spread, (most + 1, rows.layout.width)).astype(np.float32)
        )
        table[0] = 0
    if variant.fused:
        fuse_projections(model)
    if variant.attend is not None:
        for module in model.modules():
            setattr(module, ATTEND, variant.attend)
    cast_inside(model, rows, arguments.precision)
    packing = variant.packing() if variant.packing else None

    def finish() -> None:
        if rows is not None and not variant.apart:
            fuse_branches(model, rows)
        if isinstance(packing, VarlenPacking) and packing.joint:
            join_projections(model, packing)
        if isinstance(rows, RowsWithOnes):
            join_by_products(model, rows)

    names = tuple(make_inputs(arguments.shape, 1, 8))
    graph = write_graph(model, names, place, rows, packing, finish, alone=variant.alone)
    file = ALONE_FILE if graph.alone else PACKED_FILE if graph.packed else MODEL_FILE
    return place / file, table, variant.one_customer, variant.sdpa
