"""A question to a kernel: the answer that was guessed before it was asked, and the one that was found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.helper as helper
import onnxruntime

from qrlora_deploy.errors import first_line

MICROSOFT = "com.microsoft"

KINDS = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "int64": onnx.TensorProto.INT64,
    "int32": onnx.TensorProto.INT32,
    "bool": onnx.TensorProto.BOOL,
}
"""ONNX's names of the dtypes that occur here."""

WRONG = "WRONG"
"""In the answer where a row was spoilt by another one."""

KERNELS = {"flash": "1", "efficient": "2", "math": "16"}
"""Values of the CUDA provider's option `sdpa_kernel`: attention by this one alone, where it can."""


@dataclass(frozen=True)
class Place:
    """Where a question is asked.

    Attributes:
        provider: "cpu" or "cuda".
        kernel: of attention, a key of `KERNELS`; empty: ONNX Runtime's choice.
        tf32: whether CUDA may round fp32 to TF32.
        graphs: whether CUDA captures graphs.
    """

    provider: str
    kernel: str = ""
    tf32: bool = False
    graphs: bool = False

    def __str__(self) -> str:
        return " ".join(filter(None, (self.provider, self.kernel, "tf32" if self.tf32 else "")))

    def open(self, model: onnx.ModelProto, options: Any = None) -> Any:
        """An `onnxruntime.InferenceSession`; what it logs of errors, which are answers here, is left out."""
        options = options or onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        if self.provider == "cpu":
            return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        settings = {"use_tf32": str(int(self.tf32)), "enable_cuda_graph": str(int(self.graphs))}
        settings |= {"sdpa_kernel": KERNELS[self.kernel]} if self.kernel else {}
        providers = [("CUDAExecutionProvider", settings), "CPUExecutionProvider"]
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers, enable_fallback=0)


@dataclass(frozen=True)
class Trial:
    """A question.

    Attributes:
        operator: the kernel that is asked.
        question: what it is asked.
        guesses: by provider, what was expected before it ran for the first time; a provider that is not there is
            not asked. The guess is right where the answer begins with it.
        ask: gives the answer at a place.
        kernels: whether attention's kernels are asked one by one, too.
        tf32: whether it is asked with TF32 as well.
    """

    operator: str
    question: str
    guesses: Mapping[str, str]
    ask: Callable[[Place], str]
    kernels: bool = False
    tf32: bool = False

    def places(self, provider: str) -> list[Place]:
        """Where it is asked on a provider."""
        if provider not in self.guesses:
            return []
        kernels = list(KERNELS) if self.kernels and provider == "cuda" else []
        also = [Place(provider, tf32=True)] if self.tf32 and provider == "cuda" else []
        return [Place(provider), *(Place(provider, kernel) for kernel in kernels), *also]

    def answer(self, place: Place) -> str:
        """What is found at a place; what it refuses is an answer, too."""
        try:
            return self.ask(place)
        # ONNX Runtime's exceptions share no base class of their own.
        except Exception as error:
            return f"refused: {first_line(error).rpartition('Status Message: ')[2][:110]}"


def one_node(
    operator: str,
    feeds: Mapping[str, np.ndarray],
    wanted: Sequence[str] = ("y",),
    inputs: Sequence[str] | None = None,
    opset: int = 23,
    **attributes: Any,
) -> onnx.ModelProto:
    """A graph of one operator, whose inputs are `feeds`; an empty name in `inputs` is one that is left out."""
    domain = MICROSOFT if operator.endswith("MultiHeadAttention") or operator == "GroupQueryAttention" else ""
    names = list(feeds) if inputs is None else list(inputs)
    node = helper.make_node(operator, names, list(wanted), domain=domain, **attributes)
    return graph([node], feeds, [name for name in wanted if name][:1], opset)


def graph(
    nodes: Sequence[Any], feeds: Mapping[str, np.ndarray], wanted: Sequence[str], opset: int = 23
) -> onnx.ModelProto:
    """A graph whose inputs have the names and dtypes of `feeds`, of any shape."""
    values = [
        helper.make_tensor_value_info(name, KINDS[array.dtype.name], [f"{name}_{axis}" for axis in range(array.ndim)])
        for name, array in feeds.items()
    ]
    kind = KINDS[next(iter(feeds.values())).dtype.name]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name in wanted]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(helper.make_graph(nodes, "g", values, outputs), opset_imports=imports, ir_version=10)


def run(place: Place, model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """The first output, in fp64."""
    found: np.ndarray = place.open(model).run(None, dict(feeds))[0]
    return found.astype(np.float64)
