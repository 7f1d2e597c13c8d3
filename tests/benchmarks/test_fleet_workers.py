"""Workers of a fleet: their shards are held against one worker's files, and a fleet adapts the layers it says."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common.layers import targets_of
from benchmarks.common.shapes import random_classifier
from benchmarks.fleet.setup import TARGETS
from benchmarks.fleet_workers import BOUNDS, check
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint

Write = Callable[[str, dict[str, float]], Path]


@pytest.fixture
def write(tiny_customer: Coefficients, tmp_path: Path) -> Write:
    """Write customers whose first coefficient is given, the largest of each being 2."""

    def write(folder: str, customers: dict[str, float]) -> Path:
        (tmp_path / folder).mkdir()
        for name, first in customers.items():
            values = np.concatenate([[first, 2.0], tiny_customer.values[2:]]).astype(np.float32)
            write_coefficients(replace(tiny_customer, values=values), tmp_path / folder / f"{name}.safetensors")
        return tmp_path / folder

    return write


def test_shards_that_agree(write: Write) -> None:
    found = check(write("one", {"a": 1.0, "b": 1.0, "c": 1.0}), write("two", {"a": 1.0, "b": 1.02, "c": 0.5}), 0.3)
    assert found == {"customers": 3, "median": pytest.approx(0.01, rel=1e-5), "largest": pytest.approx(0.25)}


@pytest.mark.parametrize(
    ("customers", "words"),
    [
        ({"a": 1.0}, "do not make up the whole fleet"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "do not make up the whole fleet"),
        ({"a": 1.0, "b": 1.01}, r"b\.safetensors differs by 0\.005"),
    ],
)
def test_shards_that_do_not(write: Write, customers: dict[str, float], words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        check(write("one", {"a": 1.0, "b": 1.0}), write("two", customers), BOUNDS["cpu"])


def test_a_folder_without_customers_is_no_agreement(write: Write) -> None:
    with pytest.raises(SystemExit, match="do not make up the whole fleet"):
        check(write("one", {}), write("two", {}), BOUNDS["cpu"])


@pytest.mark.parametrize(
    ("family", "sizes", "query"),
    [
        ("Bert", {"hidden_size": 32, "num_hidden_layers": 5, "intermediate_size": 64}, "query"),
        ("MPNet", {"hidden_size": 32, "num_hidden_layers": 5, "intermediate_size": 64}, "q"),
        ("DistilBert", {"dim": 32, "n_layers": 5, "hidden_dim": 64}, "q_lin"),
    ],
)
def test_layers_of_every_family(family: str, sizes: dict[str, int], query: str, tmp_path: Path) -> None:
    heads = {"n_heads": 2} if family == "DistilBert" else {"num_attention_heads": 2}
    random_classifier(family, sizes | heads | {"vocab_size": 40}).save_pretrained(tmp_path)
    checkpoint, blocks = open_checkpoint(str(tmp_path)), 5
    choices = (TARGETS["linear"], (("query", "value"), None), TARGETS["paper"])
    linear, customary, paper = (targets_of(checkpoint.skeleton(), *choice) for choice in choices)
    assert len(linear) == 6 * blocks and len(customary) == 2 * blocks and len(paper) == 4
    assert set(paper) < set(customary) < set(linear)
    assert [name.endswith(f".{query}") and f".{number + 1}." in name for number, name in enumerate(paper)] == [True] * 4
