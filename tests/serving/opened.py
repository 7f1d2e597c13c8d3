"""A bundle and a folder of customers, open behind an application."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.testclient import TestClient

from qrlora_deploy.serving.http.app import make_app
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.opening import ModelPlaces, OpenModel, RunOptions
from qrlora_deploy.serving.served import Models


@contextmanager
def opened_model(name: str, bundle: Path, customers: Path) -> Iterator[OpenModel]:
    """A model with its engine, closed at the end."""
    model = OpenModel(ModelPlaces(name, bundle, customers), RunOptions(threads=1))
    try:
        yield model
    finally:
        model.close()


def client_of(model: OpenModel) -> TestClient:
    """A client of a server of that model, which is ready."""
    front = Front(Models([model.served]))
    front.life.begin()
    return TestClient(make_app(front))
