"""Attention where a row may look at nothing, where masks are as low as numbers go, and beside rows of NaN.

Every batch has a row that is as rows should be, whose answer must be right whatever the other row is.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.kernels.trial import WRONG, Place, Trial, one_node, run

HEADS, SIZE, LENGTH = 2, 64, 16
ATTENDED = 5
"""Tokens that a row with something masked looks at."""

TOLERANCES = {"float32": 1e-4, "float16": 5e-3}
DTYPES = ("float32", "float16")

Arrays = dict[str, np.ndarray]


def states(dtype: str, rows: int = 2) -> Arrays:
    """Queries, keys and values `[rows, length, heads * size]`."""
    random = np.random.default_rng(0)
    return {name: random.normal(size=(rows, LENGTH, HEADS * SIZE)).astype(dtype) for name in "qkv"}


def attended(arrays: Arrays, row: int, keys: int) -> np.ndarray:
    """What a row answers that looks at its first `keys`: `[length, heads * size]` in fp64."""
    q, k, v = (arrays[name][row].astype(np.float64).reshape(LENGTH, HEADS, SIZE).swapaxes(0, 1) for name in "qkv")
    scores = q @ k[:, :keys].swapaxes(1, 2) / np.sqrt(SIZE)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    answer: np.ndarray = (weights @ v[:, :keys]).swapaxes(0, 1).reshape(LENGTH, HEADS * SIZE)
    return answer


def named(found: np.ndarray, arrays: Arrays, row: int, dtype: str) -> str:
    """What an answer `[n, heads * size]` of a row is, in a word."""
    tolerance, values = TOLERANCES[dtype], arrays["v"][row].astype(np.float64)
    known = {
        "right": attended(arrays, row, ATTENDED)[: len(found)],
        "everything": attended(arrays, row, LENGTH)[: len(found)],
        "mean": np.broadcast_to(values.mean(0), found.shape),
        "zeros": np.zeros_like(found),
    }
    if not np.isfinite(found).all():
        return "NaN" if np.isnan(found).all() else "NaN or Inf in part"
    return next((word for word, answer in known.items() if np.abs(found - answer).max() < tolerance), "something else")


def beside(answer: str, found: np.ndarray, arrays: Arrays, row: int, dtype: str) -> str:
    """`answer`, and whether the row that is as it should be was spoilt."""
    error = np.abs(found - attended(arrays, row, LENGTH)[: len(found)]).max()
    return answer if error < TOLERANCES[dtype] else f"{answer}; THE OTHER ROW IS {WRONG}"


def _mask(kind: str, dtype: str) -> np.ndarray:
    """`[2, 1, length, length]`; the first row looks at everything."""
    if kind == "False throughout":
        allowed = np.ones((2, 1, LENGTH, LENGTH), dtype=bool)
        allowed[1] = False
        return allowed
    mask = np.zeros((2, 1, LENGTH, LENGTH), dtype=dtype)
    low = -np.inf if kind.startswith("-inf") else np.finfo(dtype).min
    mask[1, ..., 0 if kind.endswith("throughout") else ATTENDED :] = low
    return mask


def standard(dtype: str, kind: str) -> Callable[[Place], str]:
    """`Attention` of opset 23 with a mask."""

    def ask(place: Place) -> str:
        arrays = states(dtype)
        feeds = arrays | {"mask": _mask(kind, dtype)}
        found = run(place, one_node("Attention", feeds, q_num_heads=HEADS, kv_num_heads=HEADS), feeds)
        return beside(named(found[1], arrays, 1, dtype), found[0], arrays, 0, dtype)

    return ask


def lengths(dtype: str, count: int, behind: float = 0.0) -> Callable[[Place], str]:
    """`Attention` of opset 24, whose second row has `count` tokens, and `behind` stands on the others."""

    def ask(place: Place) -> str:
        arrays = states(dtype)
        clean = {name: array.copy() for name, array in arrays.items()}
        if behind:
            arrays["k"][1, count:] = arrays["v"][1, count:] = behind
        feeds = arrays | {"lengths": np.array([LENGTH, count], dtype=np.int64)}
        names = ["q", "k", "v", "", "", "", "lengths"]
        model = one_node("Attention", feeds, inputs=names, opset=24, q_num_heads=HEADS, kv_num_heads=HEADS)
        found = run(place, model, feeds)
        return beside(named(found[1], clean, 1, dtype), found[0], clean, 0, dtype)

    return ask


def multi_head(dtype: str, kind: str) -> Callable[[Place], str]:
    """`MultiHeadAttention` with a mask of keys, or with a bias."""

    def ask(place: Place) -> str:
        arrays = states(dtype)
        if kind == "False throughout":
            present = np.ones((2, LENGTH), dtype=np.int32)
            present[1] = 0
            feeds, names = arrays | {"present": present}, ["q", "k", "v", "", "present"]
        else:
            bias = np.ascontiguousarray(np.broadcast_to(_mask(kind, dtype), (2, HEADS, LENGTH, LENGTH)))
            feeds, names = arrays | {"bias": bias}, ["q", "k", "v", "", "", "bias"]
        found = run(place, one_node("MultiHeadAttention", feeds, inputs=names, num_heads=HEADS), feeds)
        return beside(named(found[1], arrays, 1, dtype), found[0], arrays, 0, dtype)

    return ask


def packed(dtype: str, counts: tuple[int, int], bias: str = "", spoilt: bool = False) -> Callable[[Place], str]:
    """`PackedMultiHeadAttention` of two rows of `counts` tokens; the first has the answer."""

    def ask(place: Place) -> str:
        arrays = states(dtype)
        clean = {name: array.copy() for name, array in arrays.items()}
        if spoilt:
            for array in arrays.values():
                array[1] = np.nan
        feeds = {name: np.concatenate([array[row, : counts[row]] for row in (0, 1)]) for name, array in arrays.items()}
        positions = np.arange(2 * LENGTH, dtype=np.int32).reshape(2, LENGTH)
        present = np.arange(LENGTH) < np.array(counts)[:, None]
        feeds["offsets"] = np.concatenate([positions[present], positions[~present]]).reshape(2, LENGTH)
        feeds["borders"] = np.array([0, counts[0], sum(counts)], dtype=np.int32)
        names = ["q", "k", "v", "", "offsets", "borders"]
        if bias:
            feeds["bias"] = np.ascontiguousarray(np.broadcast_to(_mask(bias, dtype)[1:], (1, HEADS, LENGTH, LENGTH)))
            names.append("bias")
        found = run(place, one_node("PackedMultiHeadAttention", feeds, inputs=names, num_heads=HEADS), feeds)
        return named(found[: counts[0]], clean, 0, dtype)

    return ask


def grouped(dtype: str, behind: float = 0.0, spoilt: bool = False) -> Callable[[Place], str]:
    """`GroupQueryAttention`, one token more; `behind` stands on the free places of the cache."""

    def ask(place: Place) -> str:
        arrays = states(dtype)
        clean = {name: array.copy() for name, array in arrays.items()}
        last = {0: LENGTH - 1, 1: ATTENDED - 1}
        cache = {
            name: arrays[name].reshape(2, LENGTH, HEADS, SIZE).swapaxes(1, 2).copy(order="C") for name in ("k", "v")
        }
        feeds = {
            name: np.stack([arrays[name][row, place : place + 1] for row, place in last.items()]) for name in "qkv"
        }
        for past in cache.values():
            past[1, :, ATTENDED - 1 :] = behind
            past[0, :, LENGTH - 1 :] = behind
            past[1] = np.nan if spoilt else past[1]
        feeds |= {"past_k": cache["k"], "past_v": cache["v"], "seqlens": np.array([*last.values()], dtype=np.int32)}
        feeds["total"] = np.array([LENGTH], dtype=np.int32)
        outputs = ("y", "present_k", "present_v")
        model = one_node("GroupQueryAttention", feeds, outputs, num_heads=HEADS, kv_num_heads=HEADS)
        found = run(place, model, feeds)
        rows = [found[row, 0] for row in (0, 1)]
        right = [attended(clean, row, last[row] + 1)[last[row]] for row in (0, 1)]
        wrong = [not np.abs(rows[row] - right[row]).max() < TOLERANCES[dtype] for row in (0, 1)]
        if spoilt:
            return "right" if not wrong[0] else f"THE OTHER ROW IS {WRONG}"
        return "right" if not any(wrong) else f"wrong in row {', '.join(str(row) for row in (0, 1) if wrong[row])}"

    return ask


def spoilt_row(operator: str, dtype: str) -> Callable[[Place], str]:
    """A row of NaN beside one that is as it should be."""

    def ask(place: Place) -> str:
        arrays = states(dtype)
        clean = {name: array.copy() for name, array in arrays.items()}
        for array in arrays.values():
            array[1] = np.nan
        settings: dict[str, Any] = {"num_heads": HEADS}
        if operator == "Attention":
            settings = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
        found = run(place, one_node(operator, arrays, **settings), arrays)
        return beside("right", found[0], clean, 0, dtype)

    return ask


def trials() -> list[Trial]:
    """The questions; every guess was written before its first run."""
    asked: list[Trial] = []
    for dtype in DTYPES:

        def add(
            operator: str,
            question: str,
            cpu: str,
            cuda: str,
            ask: Callable[[Place], str],
            dtype: str = dtype,
            kernels: bool = True,
        ) -> None:
            guesses = {name: guess for name, guess in (("cpu", cpu), ("cuda", cuda)) if guess}
            asked.append(Trial(operator, f"{question}, {dtype}", guesses, ask, kernels))

        one = "Attention 23"
        add(one, "row masked by False throughout", "mean", "mean", standard(dtype, "False throughout"))
        add(one, "row masked by -inf throughout", "NaN", "NaN", standard(dtype, "-inf throughout"))
        add(one, "row masked by the lowest float throughout", "mean", "mean", standard(dtype, "lowest throughout"))
        add(one, "keys masked by the lowest float", "right", "right", standard(dtype, "lowest"))
        add(one, "keys masked by -inf", "right", "right", standard(dtype, "-inf"))
        add(one, "a row of NaN beside", "right", "right", spoilt_row("Attention", dtype))
        two = "Attention 24"
        add(two, "a row of length 0", "mean", "zeros", lengths(dtype, 0))
        add(two, "a row of 5 tokens", "right", "right", lengths(dtype, ATTENDED))
        add(two, "NaN behind a row of 5 tokens", "NaN", "right", lengths(dtype, ATTENDED, np.nan))
        three = "MultiHeadAttention"
        add(three, "row masked by 0 throughout", "mean", "mean", multi_head(dtype, "False throughout"))
        add(three, "row masked by -inf throughout", "NaN", "NaN", multi_head(dtype, "-inf throughout"))
        add(three, "row masked by the lowest float throughout", "mean", "mean", multi_head(dtype, "lowest throughout"))
        add(three, "keys masked by the lowest float", "right", "right", multi_head(dtype, "lowest"))
        add(three, "a row of NaN beside", "right", "right", spoilt_row("MultiHeadAttention", dtype))
        four = "PackedMultiHeadAttention"
        add(four, "an empty row behind", "", "everything", packed(dtype, (LENGTH, 0)))
        add(four, "a row of 5 tokens behind", "", "everything", packed(dtype, (LENGTH, ATTENDED)))
        add(four, "a row of NaN behind one of 5 tokens", "", "right", packed(dtype, (ATTENDED, LENGTH), spoilt=True))
        add(four, "keys masked by the lowest float", "", "right", packed(dtype, (LENGTH, LENGTH), "lowest"))
        add(four, "all masked by the lowest float", "", "mean", packed(dtype, (LENGTH, LENGTH), "lowest throughout"))
        five = "GroupQueryAttention"
        cuda = "right" if dtype == "float16" else "refused"
        add(five, "rows of 16 and 5 tokens", "right", cuda, grouped(dtype), kernels=False)
        add(five, "NaN in free places of the cache", "wrong", cuda, grouped(dtype, np.nan), kernels=False)
        add(five, "a row of NaN beside", "right", cuda, grouped(dtype, spoilt=True), kernels=False)
    return asked
