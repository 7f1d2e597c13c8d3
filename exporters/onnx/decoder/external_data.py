"""Weights written one after another to one file beside the graph, so that no more than one is in memory."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
from onnx import TensorProto
from onnx.helper import np_dtype_to_tensor_dtype

ALIGNMENT = 4096
"""Bytes; ONNX Runtime maps weights that begin on a page, and copies others."""

FILE = "model.onnx.data"


class ExternalData:
    """The file; a context manager.

    Args:
        folder: where it is made.
        name: of the file.
    """

    def __init__(self, folder: Path, name: str = FILE) -> None:
        self._name = name
        self._file = (folder / name).open("wb")

    def __enter__(self) -> "ExternalData":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, name: str, make: Callable[[], np.ndarray]) -> TensorProto:
        """Append what `make` gives; returns the tensor that refers to it."""
        array = np.ascontiguousarray(make())
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        # Bytes, as NumPy writes no numbers of other packages.
        # Not by `tofile`, which does not say that the disk is full.
        self._file.write(array.reshape(-1).view(np.uint8).data)
        kind = np_dtype_to_tensor_dtype(array.dtype)
        proto = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self._name), ("offset", offset), ("length", array.nbytes)):
            proto.external_data.add(key=key, value=str(value))
        return proto
