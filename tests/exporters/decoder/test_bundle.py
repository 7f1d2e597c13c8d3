"""Bundles of decoders: exported, opened and verified again."""

from pathlib import Path

from exporters.onnx.exporter import EXPORTER
from qrlora_deploy.runtime import open_bundle
from tests.decoders import make_basis, save_bundle, save_tiny


def test_a_switchable_bundle(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "base")
    folder = save_bundle(tmp_path / "bundle", checkpoint, make_basis(checkpoint))
    bundle = open_bundle(folder)
    assert bundle.manifest.task == "text-generation"
    assert bundle.manifest.parity.max_abs_error < bundle.manifest.parity.bound
    assert bundle.manifest.customer_effect > 100 * bundle.manifest.parity.bound
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja", "config.json"):
        assert name in bundle.manifest.files
    verdict = EXPORTER.verify(folder, None, "cpu")
    assert verdict.failure is None
    print(verdict.facts)
