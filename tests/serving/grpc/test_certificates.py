"""A gRPC server's certificates, and those of its clients."""

import asyncio
import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from qrlora_deploy.errors import InputError
from qrlora_deploy.serving.grpc.server import GrpcServer
from qrlora_deploy.serving.grpc.service import InferenceService
from qrlora_deploy.serving.tls import Tls
from tests.serving.grpc.client import Client, outputs_of, request, serving, texts

ONE = request([texts(["one"])], ["label"], "acme")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `server`, `client` and `stranger`, each a .crt that signed itself and its .key."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("server", "client", "stranger"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
            + ["-keyout", folder / f"{name}.key", "-out", folder / f"{name}.crt", "-days", "2"]
            + ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
            check=True,
            capture_output=True,
        )
    return folder


async def ask_securely(server: GrpcServer, folder: Path, trusted: str, name: str | None = None) -> Any:
    pair = (None, None) if name is None else [(folder / f"{name}.{end}").read_bytes() for end in ("key", "crt")]
    credentials = grpc.ssl_channel_credentials((folder / f"{trusted}.crt").read_bytes(), *pair)
    async with grpc.aio.secure_channel(f"127.0.0.1:{server.port}", credentials) as channel:
        return outputs_of(await Client(channel).infer(ONE, timeout=10))["label"]


async def is_refused(server: GrpcServer, folder: Path, trusted: str, name: str | None = None) -> bool:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ask_securely(server, folder, trusted, name)
    return raised.value.code() == grpc.StatusCode.UNAVAILABLE


def test_tls(service: InferenceService, certificates: Path) -> None:
    tls = Tls(certificates / "server.crt", certificates / "server.key")

    async def run() -> None:
        async with serving(service, tls=tls) as (server, without):
            assert (await ask_securely(server, certificates, "server")).shape == (1,)
            assert await is_refused(server, certificates, "stranger")
            assert (await without.error(ONE, timeout=10)).code() == grpc.StatusCode.UNAVAILABLE

    asyncio.run(run())


def test_certificates_of_clients(service: InferenceService, certificates: Path) -> None:
    tls = Tls(certificates / "server.crt", certificates / "server.key", certificates / "client.crt")

    async def run() -> None:
        async with serving(service, tls=tls) as (server, _):
            assert (await ask_securely(server, certificates, "server", "client")).shape == (1,)
            assert await is_refused(server, certificates, "server")
            assert await is_refused(server, certificates, "server", "stranger")

    asyncio.run(run())


def test_certificates_are_read_again(service: InferenceService, certificates: Path, tmp_path: Path) -> None:
    tls = Tls(tmp_path / "own.crt", tmp_path / "own.key")

    def put(name: str) -> None:
        for end in ("crt", "key"):
            shutil.copy(certificates / f"{name}.{end}", tmp_path / f"own.{end}")

    async def run() -> None:
        async with serving(service, tls=tls) as (server, _):
            put("client")
            assert (await ask_securely(server, certificates, "server")).shape == (1,)
            server.reload()
            assert (await ask_securely(server, certificates, "client")).shape == (1,)
            assert await is_refused(server, certificates, "server")
            tls.cert.write_text("none")
            with pytest.raises(InputError, match="own.crt"):
                server.reload()
            assert (await ask_securely(server, certificates, "client")).shape == (1,)

    put("server")
    asyncio.run(run())


def test_certificates_that_are_none(service: InferenceService, certificates: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.crt").write_text("no certificate")
    cert, key = certificates / "server.crt", certificates / "server.key"
    for tls, named in (
        (Tls(tmp_path / "missing.crt", key), "missing.crt"),
        (Tls(tmp_path / "empty.crt", key), "empty.crt"),
        (Tls(cert, certificates / "client.key"), "client.key"),
        (Tls(cert, key, tmp_path / "empty.crt"), "empty.crt"),
    ):
        with pytest.raises(InputError, match=named):
            GrpcServer(service, tls=tls)
