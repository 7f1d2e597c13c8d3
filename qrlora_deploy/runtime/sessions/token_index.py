"""Which tokens of a padded batch a padding-free graph computes on."""

from collections.abc import Mapping

import numpy as np
import onnxruntime

from qrlora_deploy.errors import ProviderError, argument

TOKEN_INDEX = "token_index"
"""The input of such a graph: `[tokens]` int64, positions in the batch as one row `[batch * length]`."""

STEPS, SMALLEST_STEP = 16, 64
"""Numbers of tokens that one bucket is split into, at most, and the least distance of two of them."""

FIRST_RUNTIME = "1.25"
"""1.24 opens a padding-free graph and takes no notice of the lengths of its rows; 1.23 does not open it."""


def check_runtime() -> None:
    """Whether this ONNX Runtime computes padding-free graphs correctly.

    Raises:
        ProviderError: it is older than that.
    """
    if _release(onnxruntime.__version__) < _release(FIRST_RUNTIME):
        raise ProviderError(
            f"ONNX Runtime {onnxruntime.__version__} gives wrong answers for padding-free graphs; "
            f"install {FIRST_RUNTIME} or newer, or export without {argument('padding_free')}"
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def kept_tokens(mask: np.ndarray) -> np.ndarray:
    """Positions `[tokens]` int64, rising, of the tokens of `mask [batch, length]` that take part.

    Models read their answer at the first position of a row, so that one is always among them, also
    where padding stands on it.
    """
    kept = mask != 0
    kept[:, 0] = True
    return np.flatnonzero(kept)


def is_right_padded(mask: np.ndarray) -> bool:
    """Whether every row of `mask [batch, length]` is text, at least one token of it, and then padding."""
    text = mask != 0
    return bool(text[:, 0].all() and (text[:, 1:] <= text[:, :-1]).all())


def is_plain_text(inputs: Mapping[str, np.ndarray], pad: int) -> bool:
    """Whether packed attention takes a batch: right-padded, and without a token of padding, `pad`, in its text.

    Some models count no such token as a position, whatever the mask says.
    """
    mask = inputs["attention_mask"]
    return is_right_padded(mask) and not ((inputs["input_ids"] == pad) & (mask != 0)).any()


def write_tokens(target: np.ndarray, kept: np.ndarray) -> None:
    """Write the positions `kept` into `target [at least as many]`, and position 0 behind them.

    Position 0 is always kept; a token that is computed twice has the same state twice.
    """
    target[: len(kept)] = kept
    target[len(kept) :] = 0


def padded_tokens(tokens: int, batch: int, length: int) -> int:
    """How many tokens a bucket of `batch` rows of `length` computes on where `tokens` are kept.

    A captured graph has one size, so the number is rounded up: to a sixteenth of the batch, and to
    the next 64, below which a product on a GPU takes no less time.
    """
    whole = batch * length
    step = -(-whole // STEPS // SMALLEST_STEP) * SMALLEST_STEP
    return min(-(-tokens // step) * step, whole)
