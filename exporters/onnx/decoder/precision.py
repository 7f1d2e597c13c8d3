"""What weights and activations of a decoder's graph are."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class Precision:
    """Of a graph.

    Attributes:
        dtype: of activations and branches, and of weights that are not quantised.
        bits: of the base's weights; 0: they are not quantised.
    """

    dtype: Any
    bits: int = 0


PRECISIONS = {
    "fp32": Precision(np.float32),
    "fp16": Precision(np.float16),
    "bf16": Precision(ml_dtypes.bfloat16),
    "int8": Precision(np.float32, 8),
    "int4": Precision(np.float32, 4),
}
