"""A session with customers, and an engine on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime import Bundle, open_bundle
from qrlora_deploy.serving.engine.local import LocalEngine
from tests.runtime.fire import made_up_customer
from tests.serving.engine.place import WatchedSession

HEADS = (None, 2, 3, 6)


@pytest.fixture(scope="session")
def bundle(switchable: Path) -> Bundle:
    return open_bundle(switchable)


@pytest.fixture(scope="session")
def crowd(bundle: Bundle) -> dict[str, Coefficients]:
    """16 customers, some with heads of their own."""
    return {f"c{number}": made_up_customer(bundle.manifest, number, HEADS[number % 4]) for number in range(16)}


@pytest.fixture
def session(bundle: Bundle, crowd: dict[str, Coefficients]) -> WatchedSession:
    session = WatchedSession(bundle)
    for name, coefficients in crowd.items():
        session.load(name, coefficients)
    return session


@pytest.fixture
def engine(session: WatchedSession) -> Iterator[LocalEngine]:
    with LocalEngine(session) as engine:
        yield engine
        session.gate.set()
