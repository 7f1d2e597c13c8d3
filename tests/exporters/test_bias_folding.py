"""Biases that attention does not need: the same logits without them, and one operator less for each."""

from pathlib import Path

import numpy as np
import pytest
import torch

from exporters.onnx.bias_folding import fold_attention_biases
from exporters.onnx.switchable import make_switchable
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE
from tests.exporters.test_switchable import save_encoder
from tests.tolerances import FP32_SIDE_BRANCH

IDS = torch.tensor([[7, 8, 9, 10, 0, 0], [11, 12, 13, 14, 15, 16]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]])


def load(name: str, folder: Path):  # type: ignore[no-untyped-def]
    """An encoder whose biases are not zero."""
    checkpoint = open_checkpoint(str(save_encoder(name, folder / "base")))
    model = checkpoint.load_model()
    with torch.no_grad():
        torch.manual_seed(1)
        for path, parameter in model.named_parameters():
            if path.endswith("bias"):
                parameter.normal_(std=0.5)
    return checkpoint, model


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "distilbert"])
def test_folding_changes_no_logit(name: str, tmp_path: Path) -> None:
    _checkpoint, model = load(name, tmp_path)
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=MASK).logits.numpy()
        assert fold_attention_biases(model) == 4
        found = model(input_ids=IDS, attention_mask=MASK).logits.numpy()
    np.testing.assert_allclose(found, expected, **FP32_SIDE_BRANCH)
    assert fold_attention_biases(model) == 0


@pytest.mark.parametrize(("targets", "folded"), [(("k", "v"), 4), (("v", "o"), 2)])
def test_a_bias_stays_where_customers_change_what_is_behind_it(
    targets: tuple[str, ...], folded: int, tmp_path: Path
) -> None:
    checkpoint, model = load("mpnet", tmp_path)
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton(), targets), EnergyShare(0.5))
    rows = make_switchable(model, basis)
    table = torch.randn(3, rows.layout.width, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        rows.fill({TABLE: table, SLOT: torch.tensor([2, 1])})
        expected = model(input_ids=IDS, attention_mask=MASK).logits.numpy()
        assert fold_attention_biases(model) == folded
        found = model(input_ids=IDS, attention_mask=MASK).logits.numpy()
    np.testing.assert_allclose(found, expected, **FP32_SIDE_BRANCH)
