"""A server's application over the tiny switchable bundle."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("orjson", reason="needs the extra serve")

from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.served import Models, ServedModel
from qrlora_deploy.serving.tokenizing import RowTokenizer
from tests.serving.direct_engine import DirectEngine


def own_head(customer: Coefficients, labels: tuple[str, ...]) -> Coefficients:
    """The customer with an output layer of its own."""
    random = np.random.default_rng(len(labels))
    head = {
        "weight": random.normal(size=(len(labels), 32)).astype(np.float32),
        "bias": random.normal(size=len(labels)).astype(np.float32),
    }
    return replace(customer, labels=labels, head=head)


@pytest.fixture(scope="session")
def customers(tiny_customer: Coefficients) -> dict[str, Coefficients]:
    """acme as it is, beta with other numbers, gamma with a head of two labels and delta with one of six."""
    return {
        "acme": tiny_customer,
        "beta": replace(tiny_customer, values=tiny_customer.values * np.float32(-0.5)),
        "gamma": own_head(tiny_customer, ("no", "yes")),
        "delta": own_head(tiny_customer, ("a", "b", "c", "d", "e", "f")),
    }


@pytest.fixture
def session(switchable: Path) -> SwitchableSession:
    return SwitchableSession(open_bundle(switchable), threads=1)


@pytest.fixture
def model(session: SwitchableSession, customers: dict[str, Coefficients]) -> Iterator[ServedModel]:
    """`tiny`, with `customers` loaded."""
    engine = DirectEngine(session, customers)
    yield ServedModel("tiny", session.bundle, engine, RowTokenizer(session.bundle))
    engine.close()


@pytest.fixture
def models(model: ServedModel) -> Models:
    return Models([model])


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority, and a server and a client that it signed."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl to make certificates")
    folder = tmp_path_factory.mktemp("certificates")
    new = "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"

    def openssl(line: str) -> None:
        subprocess.run(["openssl", *line.split()], cwd=folder, check=True, capture_output=True, timeout=60)

    openssl(f"{new} -x509 -keyout ca.key -out ca.pem -days 2 -subj /CN=authority")
    for name in ("server", "client"):
        openssl(f"{new} -keyout {name}.key -out {name}.csr -subj /CN={name} -addext subjectAltName=DNS:localhost")
        openssl(
            f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out {name}.pem "
            f"-copy_extensions copy"
        )
    return folder
