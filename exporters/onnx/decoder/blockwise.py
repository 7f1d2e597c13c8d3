"""Products with weights of 4 or 8 bits, rounded in blocks that have a scale each."""

from collections.abc import Callable
from functools import cache

import numpy as np

from exporters.onnx.decoder.nodes import MICROSOFT, Nodes

BLOCK = 32
"""Weights of one output that share a scale."""

ACCURACY_LEVEL = 4
"""Activations are rounded to 8 bits in the same blocks, for products of whole numbers: on a CPU they are three times as
fast as with level 1, which makes fp32 of the weights, and cost less than the rounding of the weights does."""

LEVELS = {4: 8, 8: 128}
"""By the number of bits: what stands for zero."""


def blockwise(
    nodes: Nodes, x: str, name: str, shape: tuple[int, int], make: Callable[[], np.ndarray], bits: int
) -> str:
    """A product with a rounded weight.

    Args:
        nodes: the graph.
        x: `[..., in]`.
        name: of the weight.
        shape: of the weight, `[out, in]`.
        make: gives the weight, fp32; called once.
        bits: 4 or 8.

    Returns:
        `[..., out]`.
    """
    rounded = cache(lambda: quantize(make(), bits))
    packed = nodes.weight(f"{name}.int{bits}", lambda: rounded()[0], np.uint8)
    scales = nodes.weight(f"{name}.scales", lambda: rounded()[1])
    settings = {"N": shape[0], "K": shape[1], "bits": bits, "block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL}
    return nodes.add("MatMulNBits", [x, packed, scales], MICROSOFT, **settings)


def quantize(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """`[out, in]` fp32 as whole numbers `[out, blocks, bytes]` uint8 and scales `[out, blocks]` fp32.

    The number of a block that is largest in size becomes the lowest level, exactly; the last block is filled up.
    """
    rows, width = weight.shape
    blocks = -(-width // BLOCK)
    whole = np.zeros((rows, blocks * BLOCK), dtype=np.float32)
    whole[:, :width] = weight
    whole = whole.reshape(rows, blocks, BLOCK)
    largest = np.take_along_axis(whole, np.abs(whole).argmax(axis=-1, keepdims=True), axis=-1)
    zero = LEVELS[bits]
    scales = largest / -zero
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    levels = np.clip(np.rint(whole * inverse) + zero, 0, 2 * zero - 1).astype(np.uint8)
    if bits == 4:
        levels = levels[..., 0::2] | (levels[..., 1::2] << 4)
    return levels, scales[..., 0]
