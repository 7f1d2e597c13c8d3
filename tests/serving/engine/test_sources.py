"""Customers from a folder, a packed file, both or neither."""

from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy.errors import InputError, UnknownCustomerError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from qrlora_deploy.serving.engine.local import LocalEngine
from qrlora_deploy.serving.engine.sources import (
    CustomerSource,
    FolderSource,
    ManySources,
    NoSource,
    PackedSource,
    source_of,
)
from tests.runtime.place import Place, until
from tests.serving.engine.place import a_row, ask


@pytest.fixture
def place(tmp_path: Path, switchable: Path, tiny_customer: Coefficients) -> Place:
    return Place(tmp_path / "customers", switchable, tiny_customer)


@pytest.fixture
def packed(place: Place, tmp_path: Path) -> Path:
    path = tmp_path / "all.safetensors"
    write_packed([("acme", place.version(3)), ("bulk", place.version(2))], path, place.session.manifest)
    return path


def test_a_folder_is_followed_and_read_on_request(place: Place) -> None:
    place.put("acme", 1)
    source = source_of(folder=place.folder)
    source.open(place.session)
    with LocalEngine(place.session) as engine:
        assert len(place.session.table) == 0
        assert ask(engine, [a_row(5, "acme")]).result(30)[0].digest == place.version(1).digest
        place.put("acme", 2)
        digests = (place.version(1).digest, place.version(2).digest)
        until(lambda: ask(engine, [a_row(5, "acme")]).result(30)[0].digest == digests[1])
        with pytest.raises(UnknownCustomerError):
            ask(engine, [a_row(5, "nobody")]).result(30)
    source.close()
    source.close()
    assert place.session.fetch is None and place.session.customers() == ["acme"]


def test_a_folder_read_before_the_first_request(place: Place) -> None:
    for name in ("a", "b", "c"):
        place.put(name, 1)
    place.path("broken").write_bytes(b"no customer")
    source = FolderSource(place.folder, place.events.append, preload=True)
    source.open(place.session)
    assert sorted(place.session.customers()) == ["a", "b", "c"]
    assert "refused" in place.kinds()
    source.close()
    small = place.open(rows=3, max_rows=3)
    source.open(small)
    assert len(small.customers()) == 2
    source.close()


def test_a_packed_file_and_a_folder_that_wins(place: Place, packed: Path) -> None:
    place.put("acme", 1)
    source = ManySources([PackedSource(packed), FolderSource(place.folder, place.events.append, preload=True)])
    source.open(place.session)
    with LocalEngine(place.session) as engine:
        answers = ask(engine, [a_row(5, "acme"), a_row(5, "bulk")]).result(30)
        assert [answer.digest for answer in answers] == [place.version(1).digest, place.version(2).digest]
        assert place.logits("acme") == place.expected(1) and place.logits("bulk") == place.expected(2)
        write_packed([("acme", place.version(5)), ("new", place.version(4))], packed, place.session.manifest)
        source.reload()
        assert place.logits("new") == place.expected(4) and place.logits("bulk") == place.expected(2)
        until(lambda: place.logits("acme") == place.expected(1), place.events)
    source.close()


def test_what_cannot_be_served(place: Place, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        source_of(folder=tmp_path / "nowhere").open(place.session)
    with pytest.raises(InputError, match="cannot be read"):
        source_of(packed=tmp_path / "nowhere").open(place.session)
    order: list[str] = []

    class Noted(NoSource):
        def close(self) -> None:
            order.append("closed")

    with pytest.raises(InputError, match="no such folder"):
        ManySources([Noted(), FolderSource(tmp_path / "nowhere")]).open(place.session)
    assert order == ["closed"]
    for source in (FolderSource(place.folder), PackedSource(packed)):
        with pytest.raises(InputError, match="is not open"):
            source.reload()


def test_a_packed_file_that_is_damaged_changes_nothing(place: Place, packed: Path) -> None:
    source = source_of(packed=packed)
    source.open(place.session)
    before = place.logits("bulk")
    content = bytearray(packed.read_bytes())
    content[-200] ^= 1
    packed.write_bytes(content)
    with pytest.raises(InputError, match="was changed"):
        source.reload()
    assert place.logits("bulk") == before != place.logits(None)
    source.close()


def test_no_source(place: Place) -> None:
    source: CustomerSource = source_of()
    source.open(place.session)
    source.reload()
    place.session.load("acme", place.version(1))
    np.testing.assert_array_equal(place.logits("acme"), place.expected(1))
    source.close()
