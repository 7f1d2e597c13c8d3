"""Bundles of decoders on a GPU, against PyTorch in fp32, through the cache and with a customer in each row."""

from pathlib import Path
from typing import Any

import pytest

from exporters.onnx.exporter import EXPORTER
from qrlora_deploy.runtime import open_bundle
from tests.decoders import ALL, make_basis, save_bundle, save_tiny

pytestmark = pytest.mark.gpu

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "phi3": ("Phi3", {"sliding_window": 6, "tie_word_embeddings": False, "hidden_size": 64}),
    "gemma2": ("Gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 24, "final_logit_softcapping": 4.0}),
    "gemma3": ("Gemma3Text", {"sliding_window": 6, "query_pre_attn_scalar": 24}),
}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj", "qkv_proj"), ALL], ids=["attention", "all"])
@pytest.mark.parametrize("family", BASES)
def test_a_bundle_passes_its_check_and_is_verified(
    family: str, targets: tuple[str, ...], precision: str, tmp_path: Path
) -> None:
    name, changes = BASES[family]
    checkpoint = save_tiny(tmp_path / "base", name, **changes)
    folder = save_bundle(
        tmp_path / "bundle", checkpoint, make_basis(checkpoint, targets), precision=precision, provider="cuda"
    )
    parity = open_bundle(folder).manifest.parity
    # What a customer does must be told from what the precision does.
    assert parity.effect_correlation is None or parity.effect_correlation > 0.99
    assert EXPORTER.verify(folder, None, "cuda").failure is None
