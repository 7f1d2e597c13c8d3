"""Decoders that are built from a description, against transformers' own forward with side branches in the model."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from qrlora_deploy.runtime.bundle.row_layout import TableLayout
from tests.decoders import ALL, force, make_basis, make_customers, run_forced, save_tiny, write_tiny
from tests.tolerances import DECODER_FP32


def difference(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """By the spread of the logits."""
    return (found - expected) / expected.std()


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL])
def test_a_customer_in_each_row(targets: tuple[str, ...], tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "base")
    basis = make_basis(checkpoint, targets)
    customers = make_customers(basis)
    session = onnxruntime.InferenceSession(write_tiny(tmp_path / "bundle", checkpoint, basis))
    layout = TableLayout(list(basis.ranks.values()))
    table = np.stack([layout.row(values) for values in customers])
    forced = force(checkpoint, basis, customers[[1, 0, 2]])
    found = run_forced(session, forced, {"coefficient_table": table, "slot": np.array([1, 0, 2])})
    base = force(checkpoint, basis, customers[[0, 0, 0]]).logits
    assert np.abs(difference(base, forced.logits)[[0, 2]]).max() > 0.5
    np.testing.assert_allclose(difference(found, forced.logits), 0, **DECODER_FP32)


def test_a_merged_customer(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "base")
    basis = make_basis(checkpoint)
    values = make_customers(basis)[1]
    session = onnxruntime.InferenceSession(write_tiny(tmp_path / "bundle", checkpoint, basis, values))
    forced = force(checkpoint, basis, np.stack([values] * 3))
    np.testing.assert_allclose(difference(run_forced(session, forced, {}), forced.logits), 0, **DECODER_FP32)


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "head_dim": 12 + 4}),
    "qwen3": ("Qwen3", {}),
    "phi3": ("Phi3", {"sliding_window": 6, "tie_word_embeddings": False, "hidden_size": 64}),
    "gemma": ("Gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "untied": ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    name, changes = FAMILIES[family]
    checkpoint = save_tiny(tmp_path / "base", name, **changes)
    basis = make_basis(checkpoint)
    customers = make_customers(basis)
    session = onnxruntime.InferenceSession(write_tiny(tmp_path / "bundle", checkpoint, basis))
    layout = TableLayout(list(basis.ranks.values()))
    table = np.stack([layout.row(values) for values in customers])
    forced = force(checkpoint, basis, customers[[1, 0, 2]])
    found = run_forced(session, forced, {"coefficient_table": table, "slot": np.array([1, 0, 2])})
    np.testing.assert_allclose(difference(found, forced.logits), 0, **DECODER_FP32)
