"""What weights and activations of a decoder's graph are."""

from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def dtype_of(precision: str) -> np.dtype[Any]:
    """Of activations; weights have it too where they are not quantised."""
    return np.dtype(DTYPES[precision])
