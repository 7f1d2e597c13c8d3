"""The emitted attention: right for every kind of mask, on models with and without the registry."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from exporters.onnx import export_merged
from exporters.onnx.attention import onnx_attention, onnx_mask
from exporters.onnx.options import OnnxOptions
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.runtime import open_bundle, verify
from tests.tiny import build_tokenizer
from tests.tolerances import FP32_SIDE_BRANCH

SIZES: dict[str, dict[str, Any]] = {
    "MPNet": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 2, "eos_token_id": 3},
}


def states(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["boolean", "float", "none", "causal"])
def test_attention_equals_that_of_pytorch(kind: str) -> None:
    query, key, value = states(0), states(1), states(2)
    allowed = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1]]).bool()[:, None, None, :].expand(2, 1, 6, 6)
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~allowed, torch.finfo(torch.float32).min)
    mask = {"boolean": allowed, "float": additive}.get(kind)
    module = SimpleNamespace(is_causal=kind == "causal")
    found, weights = onnx_attention(module, query, key, value, mask, scaling=0.3)
    expected = scaled_dot_product_attention(query, key, value, mask, is_causal=kind == "causal", scale=0.3)
    assert weights is None
    np.testing.assert_allclose(found.numpy(), expected.transpose(1, 2).numpy(), **FP32_SIDE_BRANCH)


def test_no_row_of_a_causal_mask_is_empty_under_left_padding() -> None:
    from transformers import masking_utils

    if not hasattr(masking_utils, "bidirectional_mask_function"):
        pytest.skip("transformers 4 calls the mask function with other arguments")
    mask = onnx_mask(
        batch_size=1,
        q_length=4,
        kv_length=4,
        mask_function=masking_utils.causal_mask_function,
        attention_mask=torch.tensor([[False, False, True, True]]),
    )
    assert mask is not None
    expected = [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(mask[0, 0].int().numpy(), expected)


@pytest.mark.parametrize("family", ["MPNet", "GPT2"])
def test_other_architectures_export(family: str, tmp_path: Path, texts: Examples) -> None:
    base = save_classifier(family, tmp_path / "base")
    checkpoint = open_checkpoint(str(base))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton()), EnergyShare(0.5))
    values = np.random.default_rng(5).uniform(0.3, 1.0, basis.total_rank).astype(np.float32)
    customer = Coefficients(
        values, basis.digest, str(base), checkpoint.digest, "text-classification", checkpoint.labels
    )
    manifest = export_merged(ExportJob(checkpoint, basis, tmp_path / "bundle", customer), OnnxOptions(data=texts))
    assert manifest.customer_effect > 100 * manifest.parity.bound
    assert manifest.max_length == 64
    # MPNet has a position bias and does not use the registry; its attention is replaced.
    assert manifest.attention_nodes == 2
    assert verify(open_bundle(tmp_path / "bundle")).passed


def save_classifier(family: str, folder: Path) -> Path:
    import transformers

    positions = {"max_position_embeddings": 66} if family == "MPNet" else {}
    # MPNet and RoBERTa count positions from behind the padding index.
    pad = 1 if family == "MPNet" else 0
    tokenizer = build_tokenizer()
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), num_labels=4, pad_token_id=pad, **SIZES[family], **positions
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForSequenceClassification")(config)
        for name, parameter in model.named_parameters():
            if "LayerNorm" not in name and "ln_" not in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
