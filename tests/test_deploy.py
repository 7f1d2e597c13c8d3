"""The files of `deploy/` give `serve` options that it has, ask for its paths, and wait longer than it drains."""

import configparser
import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from qrlora_deploy.cli.group import cli

yaml = pytest.importorskip("yaml", reason="PyYAML comes with the training part")

FOLDER = Path(__file__).parents[1] / "deploy"
UNIT = configparser.ConfigParser(interpolation=None, strict=False)
UNIT.optionxform = str  # type: ignore[assignment, method-assign]
UNIT.read_string((FOLDER / "qrlora-server.service").read_text("utf-8"))
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text("utf-8"))["services"]["server"]
DOCKERFILE = (FOLDER / "Dockerfile").read_text("utf-8")
DEPLOYMENT, SERVICE, BUDGET = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text("utf-8"))
POD = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]


def docker_words(name: str) -> list[str]:
    found = re.search(rf"^{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert found
    words: list[str] = json.loads(found.group(1))
    return words


def unit_words(name: str) -> list[str]:
    return shlex.split(UNIT["Service"][name])[2:]


LINES = {
    "Dockerfile": docker_words("CMD"),
    "compose": COMPOSE["command"],
    "kubernetes": CONTAINER["args"],
    "systemd": unit_words("ExecStart"),
    "systemd, check": unit_words("ExecStartPre"),
}


def options_of(words: list[str]) -> dict[str, Any]:
    """What click makes of the words; paths are not looked for."""
    found = cli.get_command(click.Context(cli), "serve")
    assert found is not None
    command = copy.deepcopy(found)
    for parameter in command.params:
        if isinstance(parameter.type, click.Path):
            parameter.type = click.STRING
    return command.make_context("serve", list(words), resilient_parsing=False).params


@pytest.mark.parametrize("file", LINES)
def test_every_option_is_there(file: str) -> None:
    options = options_of(LINES[file])
    assert options["customers"] and options["keys"] and options["bundle"]
    assert options["check"] or (options["host"] == "0.0.0.0" and options["drain_delay"] > 0)


@pytest.mark.parametrize(
    ("file", "wait_s"),
    [
        ("compose", int(COMPOSE["stop_grace_period"].removesuffix("s"))),
        ("kubernetes", POD["terminationGracePeriodSeconds"]),
        ("systemd", int(UNIT["Service"]["TimeoutStopSec"])),
    ],
)
def test_nobody_kills_what_still_drains(file: str, wait_s: int) -> None:
    options = options_of(LINES[file])
    assert wait_s >= options["drain_delay"] + options["drain_s"] + 5


def test_probes_ask_for_paths_and_ports_of_the_server() -> None:
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    options = options_of(CONTAINER["args"])
    assert ports == {"http": options["port"], "grpc": options["grpc_port"]}
    paths = {kind: CONTAINER[kind]["httpGet"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {kind: probe["path"].rpartition("/")[2] for kind, probe in paths.items()} == {
        "startupProbe": "ready",
        "readinessProbe": "ready",
        "livenessProbe": "live",
    }
    assert all(probe["path"].startswith("/v2/health/") and probe["port"] == "http" for probe in paths.values())
    assert "/v2/health/ready" in DOCKERFILE and "EXPOSE 8080" in DOCKERFILE
    assert {port["targetPort"] for port in SERVICE["spec"]["ports"]} == set(ports)
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == labels == BUDGET["spec"]["selector"]["matchLabels"]


def test_nothing_runs_as_root_or_writes_to_the_root() -> None:
    assert re.search(r"^USER 10001$", DOCKERFILE, re.MULTILINE)
    assert POD["securityContext"]["runAsNonRoot"] and CONTAINER["securityContext"]["readOnlyRootFilesystem"]
    assert COMPOSE["read_only"] and UNIT["Service"]["DynamicUser"] == UNIT["Service"]["NoNewPrivileges"] == "yes"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze comes with systemd")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    text = (FOLDER / "qrlora-server.service").read_text("utf-8")
    # It looks for the programs, too.
    text = text.replace("/opt/qrlora/bin/qrlora-deploy", sys.executable)

    def said(unit: str) -> str:
        (tmp_path / "qrlora-server.service").write_text(unit, "utf-8")
        words = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "qrlora-server.service")]
        ran = subprocess.run(words, capture_output=True, text=True, timeout=60)
        return ran.stdout + ran.stderr + str(ran.returncode or "")

    assert said(text) == ""
    assert "ProtectHom" in said(text.replace("ProtectHome", "ProtectHom"))
