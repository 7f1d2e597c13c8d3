"""Products with weights of 4 or 8 bits, rounded in blocks that have a scale each."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx

from exporters.onnx.decoder.nodes import MICROSOFT, Nodes

PRODUCT, LEVEL = "MatMulNBits", "accuracy_level"
"""The operator, and its attribute."""

BLOCK = 32
"""Weights of one output that share a scale."""

ACCURACY_LEVEL = 4
"""Activations are rounded to 8 bits in the same blocks, for products of whole numbers: on a CPU they are three times as
fast as with level 1, which makes fp32 of the weights, and cost less than the rounding of the weights does."""

SHARES = tuple(np.float32(percent / 100) for percent in (100, 110, 105, 95, 90, 85, 80, 75, 70))
"""Scales of 4 bits that are tried, by the one that keeps the largest number of a block. A smaller one cuts that number
and is finer for all others; a larger one may have levels nearer to them."""

ROWS = 256
"""Of a weight for which scales are tried at once; more would not stay in a processor's cache."""

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
    settings = {"N": shape[0], "K": shape[1], "bits": bits, "block_size": BLOCK, LEVEL: ACCURACY_LEVEL}
    return nodes.add(PRODUCT, [x, packed, scales], MICROSOFT, **settings)


def accuracy_level(graph: onnx.GraphProto) -> Any:
    """What the products with rounded weights of a graph round their activations to, by ONNX Runtime's count; None where
    it has none.

    Raises:
        ValueError: they do not agree.
    """
    products = [node for node in graph.node if node.op_type == PRODUCT]
    levels = {item.i for node in products for item in node.attribute if item.name == LEVEL}
    if not products:
        return None
    (level,) = levels
    return level


def quantize(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """`[out, in]` fp32 as whole numbers `[out, blocks, bytes]` uint8 and scales `[out, blocks]` fp32.

    With 8 bits the number of a block that is largest in size becomes the lowest level, exactly. With 4 the scale of
    each block is the one of `SHARES` by that with the smallest sum of squared errors. The last block is filled up.
    """
    rows, width = weight.shape
    blocks = -(-width // BLOCK)
    whole = np.zeros((rows, blocks * BLOCK), dtype=np.float32)
    whole[:, :width] = weight
    whole = whole.reshape(rows, blocks, BLOCK)
    largest = np.take_along_axis(whole, np.abs(whole).argmax(axis=-1, keepdims=True), axis=-1)
    zero = LEVELS[bits]
    scales = largest / -zero
    if bits == 4:
        parts = range(0, rows, ROWS)
        scales = np.concatenate([_best_scales(whole[row : row + ROWS], scales[row : row + ROWS]) for row in parts])
    levels: np.ndarray = (_rounded(whole, scales, zero) + zero).astype(np.uint8)
    if bits == 4:
        levels = levels[..., 0::2] | (levels[..., 1::2] << 4)
    return levels, scales[..., 0]


def _best_scales(whole: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Of each block the scale by which its numbers are least off; the first one of equals."""
    best, least = scales, np.full(scales.shape, np.inf, np.float32)
    for share in SHARES:
        tried = scales * share
        error = np.square(_rounded(whole, tried, LEVELS[4]) * tried - whole).sum(axis=-1, keepdims=True)
        best, least = np.where(error < least, tried, best), np.minimum(error, least)
    return best


def _rounded(whole: np.ndarray, scales: np.ndarray, zero: int) -> np.ndarray:
    """Whole numbers from `-zero` to `zero - 1` that stand for the numbers of blocks."""
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    return np.clip(np.rint(whole * inverse), -zero, zero - 1)
