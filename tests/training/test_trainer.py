"""Training a customer: it learns, repeats itself, leaves the base alone, and never falls back silently."""

from pathlib import Path

import numpy as np
import pytest
import torch

from qrlora_deploy.basis import Basis
from qrlora_deploy.checkpoint import open_checkpoint
from qrlora_deploy.errors import ProviderError
from qrlora_deploy.files import digest_file
from qrlora_deploy.training.data import Examples
from qrlora_deploy.training.settings import TrainSettings
from qrlora_deploy.training.trainer import train
from tests.tiny import LABELS, SENTENCES

EXAMPLES = Examples(list(SENTENCES[:4]) * 4, None, list(LABELS) * 4, "tiny")
SETTINGS = {"epochs": 6, "batch_size": 4, "max_length": 16, "learning_rate": 0.1}


def test_it_learns_repeats_itself_and_leaves_the_base(tiny_base: Path, tiny_basis: Basis, tmp_path: Path) -> None:
    checkpoint, before = open_checkpoint(str(tiny_base)), digest_file(tiny_base / "model.safetensors")
    settings = TrainSettings(device="cpu", **SETTINGS)  # type: ignore[arg-type]
    one, two = (train(checkpoint, tiny_basis, EXAMPLES, EXAMPLES, settings, tmp_path / name) for name in "ab")
    np.testing.assert_array_equal(one.values, two.values)
    assert one.values.any() and one.head == {} and one.labels == LABELS
    assert one.training["metrics"]["accuracy"] > one.training["baseline"]["accuracy"]
    assert digest_file(tiny_base / "model.safetensors") == before
    one.check_fits(tiny_basis)


def test_cuda_where_there_is_none_is_refused(
    tiny_base: Path, tiny_basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = TrainSettings(device="cuda", **SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(ProviderError, match="--device cuda"):
        train(open_checkpoint(str(tiny_base)), tiny_basis, EXAMPLES, None, settings, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
