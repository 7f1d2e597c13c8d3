"""Weights of 4 and 8 bits against the formula, and their graphs against PyTorch on what they stand for."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch

from exporters.onnx.decoder import blockwise
from exporters.onnx.decoder.blockwise import quantize
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.runtime.bundle.row_layout import TableLayout
from tests.decoders import force, make_basis, make_customers, run_forced, save_tiny, write_tiny
from tests.tolerances import DECODER_FP32

ROUNDED = ("proj.weight",)


def dequantize(weight: np.ndarray, bits: int) -> np.ndarray:
    """What the two tensors stand for, by the documentation of MatMulNBits."""
    levels, scales = quantize(weight, bits)
    if bits == 4:
        levels = np.stack([levels & 15, levels >> 4], axis=-1).reshape(*levels.shape[:2], -1)
    whole = (levels.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    return whole.reshape(len(weight), -1)[:, : weight.shape[1]]


def test_4_bits_are_never_further_off_than_by_the_largest_number() -> None:
    weight = np.random.default_rng(2).normal(size=(600, 64)).astype(np.float32)
    weight[3, 5], weight[4] = 50, 0
    found = dequantize(weight, 4)
    blocks = weight.reshape(600, 2, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1) / -8
    with np.errstate(invalid="ignore"):
        plain = np.nan_to_num(np.clip(np.rint(blocks / largest), -8, 7)) * largest
    ours, theirs = (np.square(other.reshape(blocks.shape) - blocks).sum(-1) for other in (found, plain))
    assert (ours <= theirs * (1 + 1e-5)).all()
    assert ours.sum() < 0.95 * theirs.sum() and (found[4] == 0).all()


def test_a_weight_is_off_by_half_a_step() -> None:
    bits = 8
    weight = np.random.default_rng(1).normal(size=(6, 40)).astype(np.float32)
    weight[2] = 0
    found = dequantize(weight, bits)
    blocks = np.abs(np.pad(weight, ((0, 0), (0, 24))).reshape(6, 2, 32)).max(axis=-1).repeat(32, axis=1)[:, :40]
    # Half a step; a whole one at the end of the range that the largest number is not on.
    assert (np.abs(found - weight) <= blocks / 2 ** (bits - 1) + 1e-6).all()
    assert np.median(np.abs(found - weight)[weight != 0]) < blocks.mean() / 2**bits
    assert (found[2] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_graph_computes_with_the_rounded_weights(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "ACCURACY_LEVEL", 1)
    checkpoint = save_tiny(tmp_path / "base", tie_word_embeddings=False)
    basis = make_basis(checkpoint)
    customers = make_customers(basis)
    session = onnxruntime.InferenceSession(write_tiny(tmp_path / "bundle", checkpoint, basis, bits=bits))
    file = tmp_path / "base" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(ROUNDED) or name == "lm_head.weight":
            wanted = 8 if name == "lm_head.weight" else bits
            tensors[name] = torch.from_numpy(dequantize(tensor.numpy(), wanted).copy())
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    forced = force(open_checkpoint(str(tmp_path / "base")), basis, customers[[1, 0, 2]])
    layout = TableLayout(list(basis.ranks.values()))
    table = np.stack([layout.row(values) for values in customers])
    found = run_forced(session, forced, {"coefficient_table": table, "slot": np.array([1, 0, 2])})
    np.testing.assert_allclose((found - forced.logits) / forced.logits.std(), 0, **DECODER_FP32)
