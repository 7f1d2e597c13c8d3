"""Rotary tables against transformers' own classes, for every scaling."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from exporters.onnx.decoder.rotary import check_rotary, rotary_tables
from exporters.onnx.decoder.shape import read_shape
from qrlora_deploy.errors import InputError

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 256}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.0 + i / 10 for i in range(16)], "long_factor": [4.0] * 16}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "llama3": LLAMA3,
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": LONG,
}


def make_config(kind: str, theta: float = 5e5) -> Any:
    chosen = Phi3Config if kind == "longrope" else LlamaConfig
    scaling = {"rope_type": kind, "rope_theta": theta} | SCALINGS[kind]
    further = {"original_max_position_embeddings": 64, "pad_token_id": 0} if kind == "longrope" else {}
    if hasattr(LlamaConfig(), "rope_parameters"):
        return chosen(**SIZES, **further, rope_parameters=scaling)
    del scaling["rope_theta"]
    if kind == "longrope":  # transformers 4 checks the names
        scaling = {"type": kind} | SCALINGS[kind]
    return chosen(**SIZES, **further, rope_theta=theta, rope_scaling=None if kind == "default" else scaling)


@pytest.mark.parametrize("kind", SCALINGS)
def test_as_transformers_has_it(kind: str) -> None:
    config = make_config(kind)
    shape = read_shape(config, "base")
    cos, sin = rotary_tables(shape.rotary[0], shape.rotary_size, 48)
    rotary = (Phi3RotaryEmbedding if kind == "longrope" else LlamaRotaryEmbedding)(config)
    expected = rotary(torch.zeros(1, 48, 1), torch.arange(48)[None])
    for found, other in zip((cos, sin), expected, strict=True):
        # Frequencies differ by a rounding of fp32, 6e-8, which the position multiplies.
        np.testing.assert_allclose(found, other[0, :, :16].numpy(), rtol=0, atol=2e-5)


def test_a_scaling_that_depends_on_the_length_is_refused() -> None:
    with pytest.raises(InputError, match="base: rope_type 'dynamic' is not supported"):
        check_rotary({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "base")
