"""Products and look-ups: rows that a table does not have, TF32, NaN in a row of a table, and sums beyond fp16."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx.helper as helper

from benchmarks.kernels.attention import HEADS, LENGTH, states
from benchmarks.kernels.trial import WRONG, Place, Trial, graph, one_node, run

WIDTH, RANK, ROWS = 256, 16, 4
NO_ROW = 2**31 - 1


def look_up(dtype: str, slot: int) -> Callable[[Place], str]:
    """`Gather` of one row."""

    def ask(place: Place) -> str:
        table = 1 + np.arange(ROWS * WIDTH).reshape(ROWS, WIDTH).astype(dtype)
        feeds = {"table": table, "slot": np.array([1, slot], dtype=np.int64)}
        found = run(place, one_node("Gather", feeds), feeds)[1]
        known = {f"row {row}": table[row].astype(np.float64) for row in range(ROWS)} | {"zeros": np.zeros(WIDTH)}
        return next((word for word, row in known.items() if np.array_equal(row, found)), "something else")

    return ask


def _digits(found: np.ndarray, expected: np.ndarray) -> str:
    """Which precision an error speaks of, against a result in fp64."""
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    name = "fp32" if error < 2e-5 else "TF32" if error < 5e-3 else "wrong"
    return f"{name} (error {error:.0e})"


def _multiply(operator: str) -> Callable[[Place], str]:
    def ask(place: Place) -> str:
        random = np.random.default_rng(1)
        feeds = {name: random.normal(size=(WIDTH, WIDTH)).astype(np.float32) for name in ("a", "b")}
        expected = feeds["a"].astype(np.float64) @ feeds["b"].astype(np.float64)
        if operator == "Conv":
            # One place in space: the same product.
            shaped = {"a": feeds["a"][:, :, None], "b": np.ascontiguousarray(feeds["b"].T)[:, :, None]}
            return _digits(run(place, one_node(operator, shaped), shaped)[:, :, 0], expected)
        return _digits(run(place, one_node(operator, feeds), feeds), expected)

    return ask


def _attend(operator: str) -> Callable[[Place], str]:
    """Long rows, so that a rounded product is seen."""

    def ask(place: Place) -> str:
        arrays = states("float32")
        # Scores that are far apart: a rounded one changes the answer.
        arrays["q"] *= 4
        q, k, v = (array.astype(np.float64).reshape(2, LENGTH, HEADS, -1).swapaxes(1, 2) for array in arrays.values())
        scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(2, LENGTH, -1)
        feeds, names = arrays, list("qkv")
        settings: dict[str, Any] = {"num_heads": HEADS}
        if operator == "Attention":
            settings = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
        if operator == "PackedMultiHeadAttention":
            feeds = {name: array.reshape(2 * LENGTH, -1) for name, array in arrays.items()}
            feeds |= {
                "offsets": np.arange(2 * LENGTH, dtype=np.int32).reshape(2, LENGTH),
                "borders": np.array([0, LENGTH, 2 * LENGTH], dtype=np.int32),
            }
            names += ["", "offsets", "borders"]
        found = run(place, one_node(operator, feeds, inputs=names, **settings), feeds)
        return _digits(found.reshape(expected.shape), expected)

    return ask


def _branch(feeds: Mapping[str, np.ndarray], place: Place) -> np.ndarray:
    """`[x, c * (x R)] [W; Q]`, the side branch of a graph for a GPU: `[batch, length, width]`."""
    nodes = [
        helper.make_node("Gather", ["table", "slot"], ["c"]),
        helper.make_node("Unsqueeze", ["c", "axis"], ["c_row"]),
        helper.make_node("MatMul", ["x", "r"], ["narrow"]),
        helper.make_node("Mul", ["narrow", "c_row"], ["scaled"]),
        helper.make_node("Concat", ["x", "scaled"], ["wide"], axis=-1),
        helper.make_node("MatMul", ["wide", "w"], ["y"]),
    ]
    return run(place, graph(nodes, feeds, ["y"]), feeds)


def branch(dtype: str, coefficient: float) -> Callable[[Place], str]:
    """Three customers in a batch; the second one's coefficients are `coefficient`."""

    def ask(place: Place) -> str:
        random = np.random.default_rng(2)
        feeds = {
            "x": random.normal(size=(3, LENGTH, WIDTH)),
            "table": random.normal(size=(ROWS, RANK)),
            "r": random.normal(size=(WIDTH, RANK)) / 4,
            "w": random.normal(size=(WIDTH + RANK, WIDTH)) / 16,
        }
        feeds = {name: array.astype(dtype) for name, array in feeds.items()}
        feeds |= {"slot": np.array([1, 2, 3], dtype=np.int64), "axis": np.array([1], dtype=np.int64)}
        before = _branch(feeds, place)
        feeds["table"] = feeds["table"].copy()
        feeds["table"][2] = coefficient
        found = _branch(feeds, place)
        others = "" if np.array_equal(found[[0, 2]], before[[0, 2]]) else f"; THE OTHER ROWS ARE {WRONG}"
        own = found[1]
        word = "NaN" if np.isnan(own).any() else "Inf" if np.isinf(own).any() else "finite"
        return f"{word}{others}"

    return ask


def trials() -> list[Trial]:
    """The questions; every guess was written before its first run."""
    asked = []
    for dtype in ("float32", "float16"):
        for slot, cpu, cuda in (
            (-1, f"row {ROWS - 1}", f"row {ROWS - 1}"),
            (ROWS, "refused", "zeros"),
            (-ROWS - 1, "refused", "zeros"),
            (NO_ROW, "refused", "zeros"),
        ):
            question = f"row {slot} of a table of {ROWS}, {dtype}"
            asked.append(Trial("Gather", question, {"cpu": cpu, "cuda": cuda}, look_up(dtype, slot)))
    for operator in ("MatMul", "Gemm", "Conv"):
        guesses = {"cpu": "fp32", "cuda": "fp32", "cuda tf32": "TF32"}
        asked.append(Trial(operator, "digits", guesses, _multiply(operator), tf32=True))
    for operator in ("Attention", "MultiHeadAttention", "PackedMultiHeadAttention"):
        guesses = {"cpu": "fp32", "cuda": "fp32", "cuda tf32": "TF32"}
        if operator.startswith("Packed"):
            del guesses["cpu"]
        asked.append(Trial(operator, "digits", guesses, _attend(operator), kernels=True, tf32=True))
    for dtype, values in (
        ("float32", ((np.nan, "NaN", "NaN"), (1e30, "finite", "finite"), (3e38, "NaN", "NaN"))),
        ("float16", ((np.nan, "NaN", "NaN"), (100.0, "finite", "finite"), (6e4, "Inf", "NaN"))),
    ):
        for value, cpu, cuda in values:
            question = f"a row of coefficients {value:g}, {dtype}"
            asked.append(Trial("branch", question, {"cpu": cpu, "cuda": cuda}, branch(dtype, value)))
    return asked
