"""Folders of customers, watched or not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qrlora_deploy.formats.coefficients import Coefficients
from tests.runtime.place import Place


@pytest.fixture
def place(tmp_path: Path, switchable: Path, tiny_customer: Coefficients) -> Place:
    return Place(tmp_path / "customers", switchable, tiny_customer)


@pytest.fixture
def watched(place: Place) -> Iterator[Place]:
    """With a customer acme that is in the table and watched."""
    place.put("acme", 1)
    with place.store():
        place.logits("acme")
        place.wait("loaded")
        yield place
