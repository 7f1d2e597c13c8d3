"""Decoders that are built from a description, against transformers' own forward with side branches in the model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy

from exporters.onnx.decoder import branches, coefficients, products
from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.runtime.bundle.row_layout import TableLayout, padded_rank
from tests.decoders import (
    ALL,
    Forced,
    force,
    make_basis,
    make_customers,
    run_forced,
    save_decoder,
    save_tiny,
    write_tiny,
)
from tests.tolerances import DECODER_FP16, DECODER_FP32


def difference(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """By the spread of the logits."""
    return (found - expected) / expected.std()


def both(folder: Path, checkpoint: Checkpoint, basis: Basis, **options: Any) -> tuple[Forced, np.ndarray]:
    """PyTorch's logits, and those of a graph, of three rows; the one in the middle is the base's."""
    customers = make_customers(basis)
    session = onnxruntime.InferenceSession(write_tiny(folder / "bundle", checkpoint, basis, **options))
    layout = TableLayout(list(basis.ranks.values()))
    table = np.stack([layout.row(values) for values in customers])
    forced = force(checkpoint, basis, customers[[1, 0, 2]])
    return forced, run_forced(session, forced, {"coefficient_table": table, "slot": np.array([1, 0, 2])})


@pytest.mark.parametrize("most_waste", [0.0, np.inf], ids=["apart", "joint"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL])
def test_a_customer_in_each_row(
    targets: tuple[str, ...], most_waste: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "MOST_WASTE", most_waste)
    checkpoint = save_tiny(tmp_path / "base")
    basis = make_basis(checkpoint, targets)
    customers = make_customers(basis)
    forced, found = both(tmp_path, checkpoint, basis)
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
    "a head of keys each": ("Llama", {"num_key_value_heads": 4}),
    "eight queries a key": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "heads of 80": ("Llama", {"head_dim": 80}),
    "heads of 256": ("Gemma", {"head_dim": 256, "num_key_value_heads": 1, "hidden_activation": "gelu_pytorch_tanh"}),
    "no window": ("Mistral", {"sliding_window": None}),
    "window off": ("Qwen2", {"use_sliding_window": False, "sliding_window": 4}),
    "biases": ("Qwen3", {"attention_bias": True}),
    "no caps": ("Gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "odd width": ("Llama", {"intermediate_size": 83}),
    "untied": ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    name, changes = FAMILIES[family]
    checkpoint = save_tiny(tmp_path / "base", name, **changes)
    basis = make_basis(checkpoint)
    forced, found = both(tmp_path, checkpoint, basis)
    np.testing.assert_allclose(difference(found, forced.logits), 0, **DECODER_FP32)


@pytest.mark.parametrize("most_kept", [0, 60, 1024], ids=["concatenated", "narrow ones kept", "kept"])
def test_half_precision(most_kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "MOST_KEPT", most_kept)
    checkpoint = save_tiny(tmp_path / "base")
    forced, found = both(tmp_path, checkpoint, make_basis(checkpoint), dtype=np.float16)
    np.testing.assert_allclose(difference(found, forced.logits), 0, **DECODER_FP16)


@pytest.mark.parametrize(("most_zeros", "level"), [(10**6, True), (0, False)], ids=["of one width", "as they are"])
def test_ranks_that_differ_from_block_to_block(
    most_zeros: int, level: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branches, "MOST_ZEROS", most_zeros)
    monkeypatch.setattr(coefficients, "MOST_OUTPUTS", 2)
    checkpoint = save_tiny(tmp_path / "base")
    basis = make_basis(checkpoint, rank=7)
    queries = [rank for name, rank in basis.ranks.items() if name.endswith("q_proj")]
    assert len(set(map(padded_rank, queries))) > 1
    forced, found = both(tmp_path, checkpoint, basis, dtype=np.float16)
    np.testing.assert_allclose(difference(found, forced.logits), 0, **DECODER_FP16)
    graph = onnx.load(tmp_path / "bundle" / "model.onnx", load_external_data=False).graph
    sizes = [onnx.numpy_helper.to_array(one) for one in graph.initializer if one.name.startswith("branch_sizes")]
    assert all(len(set(one)) == 1 for one in sizes) == level


def test_the_order_of_a_basis_is_that_of_the_table(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "base")
    basis = make_basis(checkpoint)
    basis = replace(basis, targets=basis.targets[::-1])
    forced, found = both(tmp_path, checkpoint, basis)
    np.testing.assert_allclose(difference(found, forced.logits), 0, **DECODER_FP32)


def test_the_likeliest_token_comes_from_the_graph(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "base", "Gemma2", final_logit_softcapping=4.0)
    basis = make_basis(checkpoint)
    session = onnxruntime.InferenceSession(write_tiny(tmp_path / "bundle", checkpoint, basis))
    empty = {
        value.name: np.zeros([3, value.shape[1], 4, value.shape[3]], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    layout = TableLayout(list(basis.ranks.values()))
    inputs = {
        "input_ids": np.random.default_rng(5).integers(4, 40, (3, 4)),
        "seqlens_k": np.full(3, 3, np.int32),
        "total_sequence_length": np.array([4], np.int32),
        "token": np.arange(3) * 4 + 3,
        "coefficient_table": np.stack([layout.row(values) for values in make_customers(basis)]),
        "slot": np.arange(3),
    }
    logits, greedy = session.run(["logits", "greedy"], inputs | empty)
    np.testing.assert_array_equal(greedy, logits.argmax(axis=-1))
    assert len(set(greedy.tolist())) > 1


def test_what_a_checkpoint_has_beside_its_family_is_refused(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "base")
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file) | {"model.layers.0.self_attn.sinks": np.ones(4, np.float32)}
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(InputError, match=r"1 tensors that its family does not, such as model.layers.0.self_attn.sinks"):
        write_tiny(tmp_path / "bundle", checkpoint, make_basis(checkpoint))


def test_a_target_outside_of_the_blocks_is_refused(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "base", tie_word_embeddings=False)
    basis = make_basis(checkpoint, ("q_proj", "lm_head"))
    for values in (None, make_customers(basis)[1]):
        with pytest.raises(InputError, match=r"the basis adapts .*lm_head, which a decoder's graph cannot"):
            write_tiny(tmp_path / "bundle", checkpoint, basis, values)


DYNAMIC = {
    # As transformers 5 has it, and as version 4 does.
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "rope_scaling": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Cohere", {}, "model type 'cohere' cannot be exported this way; format='genai' traces"),
        ("Llama", {"hidden_act": "relu"}, "activation 'relu' is not supported"),
        ("Llama", {"head_dim": 12}, "12 numbers, not a multiple of 16"),
        ("Llama", DYNAMIC, "/base: rope_type 'dynamic' is not supported; these are: default, linear, llama3"),
    ],
)
def test_what_no_graph_computes_is_refused(family: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "base", family, **changes)
    with pytest.raises(InputError, match=message):
        write_tiny(tmp_path / "bundle", checkpoint, make_basis(checkpoint))


def test_shards_in_another_dtype(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    save_decoder(tmp_path / "base")
    folder = tmp_path / "shards"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    checkpoint = open_checkpoint(str(folder))
    forced, found = both(tmp_path, checkpoint, make_basis(checkpoint))
    np.testing.assert_allclose(difference(found, forced.logits), 0, **DECODER_FP32)
