"""What a command says of devices reaches the session."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("orjson", reason="needs the extra serve")

from qrlora_deploy.errors import InputError, ProviderError
from qrlora_deploy.runtime.bundle.bundle import Bundle
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.sessions.buckets import Buckets
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving import opening
from qrlora_deploy.serving.assembly import AssemblyOptions
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.opening import ModelPlaces, OpenModel, RunOptions
from qrlora_deploy.serving.processes.options import ENGINE, ChildOptions
from qrlora_deploy.serving.server import ServerOptions
from qrlora_deploy.serving.tls import Tls


def test_a_device_and_its_options() -> None:
    assert RunOptions("cuda:1", {"gpu_mem_limit": "9"}).device == Device("cuda", 1, {"gpu_mem_limit": "9"})
    with pytest.raises(ProviderError):
        _ = RunOptions("cpu:1").device


def test_options_reach_the_session(switchable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Watched(SwitchableSession):
        def __init__(self, bundle: Bundle, provider: Device, **options: Any) -> None:
            asked.append(provider)
            super().__init__(bundle, provider, **options)

    monkeypatch.setattr(opening, "SwitchableSession", Watched)
    OpenModel(ModelPlaces("tiny", switchable), RunOptions("cpu", {"arena": "none"}, threads=1)).close()
    assert asked == [Device("cpu", 0, {"arena": "none"})]


def test_processes_are_told_what_the_command_was() -> None:
    run = RunOptions("cpu", {"a": "1"}, 2, Buckets((1, 8), (32,)), 9, Limits(max_queue_rows=7))
    server = ServerOptions("::1", 1, Tls(Path("cert"), Path("key")), is_shared=True)
    places = [ModelPlaces("a", Path("b"), Path("c"), Path("d"))]
    made_of = AssemblyOptions(
        places, run, server, Path("keys"), 2, 3, "::1", Path("audit"), ["acme"], 4, ["cuda:0", "cuda:1"]
    )
    options = ChildOptions(ENGINE, 1, Path("/tmp/x"), made_of, ["cuda:0", "cuda:1"], True)
    assert ChildOptions.of_text(options.as_text()) == options
    assert options.engine_run().run.device == Device("cuda", 1, {"a": "1"})


def test_several_devices_need_processes() -> None:
    with pytest.raises(InputError, match="processes"):
        AssemblyOptions([], devices=["cpu", "cpu"])
