"""A GPU of plain memory for the generation's code: ONNX Runtime computes on the host what is bound to "cuda"."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from qrlora_deploy.runtime.bundle.row_layout import TABLE
from qrlora_deploy.runtime.generation.cuda_cache import CudaKvCache
from qrlora_deploy.runtime.generation.cuda_graph import CudaDecoderGraph
from qrlora_deploy.runtime.generation.wishes import FILE, FILE_OF_ALL
from qrlora_deploy.runtime.table.memory import CudaMemory, TableMemory
from tests.runtime.generation.tiny import Desk, Holders, Made


class PretendSession:
    """A session on the host that takes what is bound to a GPU, and notes how it is run.

    Attributes:
        graphs: `gpu_graph_id` of each run, in order; empty where it has none.
    """

    def __init__(self, session: Any) -> None:
        self._session, self.graphs = session, list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def io_binding(self) -> Any:
        return _Binding(self._session.io_binding())

    def run_with_iobinding(self, binding: "_Binding", options: Any = None) -> None:
        try:
            self.graphs.append(options.get_run_config_entry("gpu_graph_id"))
        except RuntimeError:
            self.graphs.append("")
        self._session.run_with_iobinding(binding.inner, options)


class _Binding:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def bind_input(self, name: str, device: str, *place: Any) -> None:
        assert device == ("cpu" if name == "total_sequence_length" else "cuda")
        self.inner.bind_input(name, "cpu", *place)

    def bind_output(self, name: str, device: str, *place: Any) -> None:
        assert device == "cuda"
        self.inner.bind_output(name, "cpu", *place)


class PretendDesk(Desk):
    """A `Desk` on such a GPU, whose CUDA runtime the caller has replaced by a `FakeCuda`."""

    stays = True

    def open_graph(self) -> CudaDecoderGraph:
        self.session = PretendSession(onnxruntime.InferenceSession(self.made.model))
        self.drawing = open_drawing(0)
        return CudaDecoderGraph(self.session, 0, self.max_rows, self.block, open_drawing=lambda _: self.drawing)

    def open_cache(self, capacity: int) -> CudaKvCache:
        return CudaKvCache(self.graph.cache_shape, capacity)

    def open_holders(self) -> Holders:
        holders = Holders(self.made)
        table = holders.memory.parts[TABLE]
        lent = CudaMemory(table.rows, table.width, table.dtype)
        lent.write_rows(0, table.read_rows(0, table.rows))
        holders.memory = TableMemory({TABLE: lent})
        return holders


def open_drawing(_: int) -> tuple[PretendSession, PretendSession]:
    """Draw tokens on such a GPU."""
    best, of_all = (PretendSession(onnxruntime.InferenceSession(file)) for file in (FILE, FILE_OF_ALL))
    return best, of_all


def with_greedy(made: Made, folder: Path) -> Made:
    """The same decoder, whose graph tells the likeliest token of each row; as it is where it does already."""
    import onnx  # a serving host has it not
    from onnx import TensorProto, helper

    model = onnx.load(made.model, load_external_data=False)
    if any(output.name == "greedy" for output in model.graph.output):
        return made
    onnx.load_external_data_for_model(model, str(made.model.parent))
    model.graph.node.append(helper.make_node("ArgMax", ["logits"], ["greedy"], axis=-1, keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("greedy", TensorProto.INT64, ["batch"]))
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return Made(made.checkpoint, made.basis, np.array(made.values), folder / "model.onnx")
