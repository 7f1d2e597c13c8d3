"""The part of `qrlora-deploy serve` that runs replicas by Ray."""

from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

import click

from qrlora_deploy.cli.options import together
from qrlora_deploy.cli.ranges import COUNT
from qrlora_deploy.errors import InputError

if TYPE_CHECKING:
    from qrlora_deploy.serving.opening import ModelPlaces, RunOptions
    from qrlora_deploy.serving.ray.running import RayServer
    from qrlora_deploy.serving.ray.scaling import Scaling
    from qrlora_deploy.serving.server import ServerOptions

OPTIONS = (
    click.option("--ray", "on_ray", is_flag=True, help="Answer by replicas that Ray Serve keeps, on any machines."),
    click.option("--ray-address", metavar="ADDRESS", help="A Ray that runs, such as auto; else one is started."),
    click.option("--replicas", metavar="N|MIN:MAX", help="Replicas on Ray, or their bounds.  [default: 2]"),
    click.option("--queued-rows", type=COUNT, help="Rows that wait in a replica; then there are more.  [default: 256]"),
)

ALONE = {"grpc_port": None, "admin_port": None, "processes": 0, "otel": False}
"""Options of a server without Ray, with their defaults."""


ray_options = together(OPTIONS)
"""Add the options to a command."""


def check_ray_usage(on_ray: bool, options: dict[str, Any]) -> None:
    """Hold the options against each other.

    Raises:
        click.UsageError: one belongs to Ray and that is not asked for, or does not go with it.
    """
    given = [name for name in ("ray_address", "replicas", "queued_rows") if options[name] is not None]
    if given and not on_ray:
        raise click.UsageError(f"{_option(given[0])} needs --ray")
    alone = [name for name, usual in ALONE.items() if options[name] != usual]
    if alone and on_ray:
        raise click.UsageError(f"{_option(alone[0])} is not there with --ray")
    if on_ray and ":" in options["provider"]:
        raise click.UsageError(
            f"--provider {options['provider']} names a GPU, which Ray chooses itself; give --provider cuda"
        )


def open_ray_server(
    places: "Sequence[ModelPlaces]", run: "RunOptions", server: "ServerOptions", options: dict[str, Any]
) -> "RayServer":
    """Start the replicas, or find them.

    Raises:
        QrloraError: they cannot be started.
    """
    from qrlora_deploy.installation import parts

    parts.need("ray", "`serve --ray`")
    from qrlora_deploy.serving.ray.options import RayOptions, RayServerOptions
    from qrlora_deploy.serving.ray.replica import ReplicaOptions
    from qrlora_deploy.serving.ray.running import RayServer

    resolved = [_absolute(place) for place in places]
    keys = options["keys"].resolve() if options["keys"] else None
    app = RayOptions(
        ReplicaOptions(resolved, run, keys, server.limits),
        _scaling(options["replicas"], options["queued_rows"]),
        cpus=float(run.threads or 1),
        gpus=0.0 if run.provider == "cpu" else 1.0,
        drain_s=server.drain_s,
    )
    return RayServer(RayServerOptions(app, server, options["ray_address"], options["counted"]))


def serve_on_ray(server: "RayServer", names: Sequence[str], stream: IO[str]) -> None:
    """Serve until a signal ends it."""

    def started() -> None:
        stream.write(f"serving {', '.join(names)} on {server.server.http.url}; replicas by Ray\n")
        stream.flush()

    server.run(started)


def _scaling(replicas: str | None, rows: int | None) -> "Scaling":
    from qrlora_deploy.serving.ray.scaling import Scaling

    bounds = (replicas or "2").split(":")
    if len(bounds) > 2 or not all(part.isascii() and part.isdecimal() and len(part) < 7 for part in bounds):
        raise InputError(f"--replicas {replicas!r:.80} must be a number, or two as in 1:4")
    given = {} if rows is None else {"queued_rows": rows}
    return Scaling((int(bounds[0]), int(bounds[-1])), **given)


def _absolute(place: "ModelPlaces") -> "ModelPlaces":
    """Replicas have another working directory."""
    from dataclasses import replace

    return replace(
        place,
        bundle=place.bundle.absolute(),
        customers=place.customers and place.customers.absolute(),
        packed=place.packed and place.packed.absolute(),
    )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
