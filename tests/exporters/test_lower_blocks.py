"""Blocks below the adapted layers run once for an input, and answers are what they would be, to the bit."""

from pathlib import Path

import numpy as np
import pytest

from exporters.onnx.prepared import prepare
from exporters.onnx.reference import reference_batches
from exporters.onnx.side_branches import side_branches
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from tests.exporters.test_switchable import save_encoder


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_lower_blocks_run_once_for_an_input(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_encoder(name, tmp_path / "base")))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton(), last_layers=1), EnergyShare(0.5))
    prepared = prepare(checkpoint, None)
    inputs = reference_batches(prepared)["left padding"]
    values = np.random.default_rng(3).uniform(0.5, 1.5, basis.total_rank).astype(np.float32)
    runs = []
    first = choose_targets(checkpoint.skeleton())[0]
    with side_branches(prepared, basis) as side:
        prepared.model.get_submodule(first).register_forward_hook(lambda *_: runs.append(1))
        kept = [side.logits(customer, inputs) for customer in (0 * values, values, -values)]
        assert len(runs) == 1
        # Equal inputs are not the same ones: nothing is looked at but the object.
        fresh = [side.logits(customer, dict(inputs)) for customer in (0 * values, values, -values)]
        assert len(runs) == 4
    np.testing.assert_array_equal(np.stack(kept), np.stack(fresh))
    assert all(np.abs(fresh[0] - other).max() > 1e-3 for other in fresh[1:])
