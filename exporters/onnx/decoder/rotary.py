"""Rotary positions as two tables, with every scaling that does not depend on the length of a text.

Frequencies and angles are rounded to fp32 as transformers rounds them: at far positions that decides what they are.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qrlora_deploy.errors import InputError

Settings = Mapping[str, Any]


def rotary_tables(settings: Settings, size: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines `[positions, size / 2]` fp32.

    Args:
        settings: of a config, `rope_parameters`, as `check_rotary` takes them.
        size: numbers of a head that are rotated.
        positions: how many.
    """
    frequencies, factor = _frequencies(settings, size)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies[None].astype(np.float32)
    wide = angles.astype(np.float64)
    return (factor * np.cos(wide)).astype(np.float32), (factor * np.sin(wide)).astype(np.float32)


def check_rotary(settings: Settings, name: str) -> None:
    """Make sure that a scaling is known, before a weight is read.

    Raises:
        InputError: it is not, such as "dynamic", whose angles change with the length of a text.
    """
    kind = settings.get("rope_type", "default")
    if kind not in KINDS:
        raise InputError(f"{name}: rope_type {kind!r} is not supported; these are: {', '.join(sorted(KINDS))}")


def _frequencies(settings: Settings, size: int) -> tuple[np.ndarray, float]:
    """Frequencies `[size / 2]`, and what cosines and sines are multiplied by."""
    kind = settings.get("rope_type", "default")
    plain = 1.0 / settings["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float64) / size)
    return KINDS[kind](plain, settings, size)


def _default(plain: np.ndarray, settings: Settings, size: int) -> tuple[np.ndarray, float]:
    return plain, 1.0


def _linear(plain: np.ndarray, settings: Settings, size: int) -> tuple[np.ndarray, float]:
    return plain / settings["factor"], 1.0


def _llama3(plain: np.ndarray, settings: Settings, size: int) -> tuple[np.ndarray, float]:
    factor, low, high = settings["factor"], settings["low_freq_factor"], settings["high_freq_factor"]
    old = settings["original_max_position_embeddings"]
    lengths = 2 * math.pi / plain
    smooth = (old / lengths - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    return np.where(lengths > old / low, plain / factor, np.where(lengths < old / high, plain, between)), 1.0


def _yarn(plain: np.ndarray, settings: Settings, size: int) -> tuple[np.ndarray, float]:
    factor, theta = settings["factor"], settings["rope_theta"]
    old = settings["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return size * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(settings.get("beta_fast") or 32), dimension(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), _yarn_attention(settings, factor)


def _yarn_attention(settings: Settings, factor: float) -> float:
    given = settings.get("attention_factor")
    if given is not None:
        return float(given)

    def scale(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    one, all_dimensions = settings.get("mscale"), settings.get("mscale_all_dim")
    return scale(one) / scale(all_dimensions) if one and all_dimensions else scale(1)


def _longrope(plain: np.ndarray, settings: Settings, size: int) -> tuple[np.ndarray, float]:
    """The short factors: a bundle takes no text that is longer than they are for."""
    old, given = settings["original_max_position_embeddings"], settings.get("attention_factor")
    factor = settings["factor"]
    wide = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))
    return plain / np.asarray(settings["short_factor"], dtype=np.float64), float(given) if given else wide


KINDS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
