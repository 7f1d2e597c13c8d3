"""A graph as it grows: nodes, weights, constants."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.helper import np_dtype_to_tensor_dtype

from exporters.onnx.decoder.external_data import ExternalData

MICROSOFT = "com.microsoft"


class Nodes:
    """Nodes in the order of their computation, and what they read.

    Args:
        data: takes the weights; None: there are none.
        dtype: of weights and activations.
    """

    def __init__(self, data: ExternalData | None, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._data = data
        self.start_at = 0
        """The number of the first node, for its name."""

    @property
    def kind(self) -> int:
        """ONNX's number of the dtype."""
        return int(np_dtype_to_tensor_dtype(self.dtype))

    def add(self, operator: str, inputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        """A node with one output; returns its name."""
        return self.add_many(operator, inputs, 1, domain, **attributes)[0]

    def add_many(
        self, operator: str, inputs: Sequence[str], outputs: int | Sequence[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """A node with so many outputs, or with outputs of these names (an empty one is not wanted)."""
        name = f"{operator}_{self.start_at + len(self.nodes)}"
        names = [f"{name}_{index}" for index in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self.nodes.append(helper.make_node(operator, inputs, names, name=name, domain=domain, **attributes))
        return names

    def weight(self, name: str, make: Callable[[], np.ndarray], dtype: Any = None) -> str:
        """A tensor in the external file, cast to the graph's dtype or to another; written once."""
        if name not in self.initializers:
            assert self._data is not None
            self.initializers[name] = self._data.write(name, lambda: make().astype(dtype or self.dtype))
        return name

    def constant(self, name: str, values: Any, dtype: Any) -> str:
        """A small tensor in the graph itself.

        Raises:
            ValueError: the name is that of other values.
        """
        tensor = onnx.numpy_helper.from_array(np.asarray(values, dtype=dtype), name)
        if self.initializers.setdefault(name, tensor) != tensor:
            raise ValueError(f"two constants are called {name}")
        return name
