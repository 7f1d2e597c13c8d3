"""Object stores: of fsspec, in memory and in a folder."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from qrlora_deploy.formats.coefficients import Coefficients
from tests.runtime.customers.objects.place import ObjectPlace


@pytest.fixture(params=["memory", "file"])
def objects(
    request: pytest.FixtureRequest, tmp_path: Path, switchable: Path, tiny_customer: Coefficients
) -> Iterator[ObjectPlace]:
    root = f"{uuid.uuid4()}/customers" if request.param == "memory" else f"{tmp_path}/customers"
    place = ObjectPlace(f"{request.param}://{root}", switchable, tiny_customer)
    place.files.makedirs(place.root, exist_ok=True)
    yield place
    place.close()
    if request.param == "memory":
        fsspec.filesystem("memory").rm(root.partition("/")[0], recursive=True)
