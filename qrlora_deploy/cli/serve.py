"""`qrlora-deploy serve`."""

import ipaddress
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from qrlora_deploy.cli.group import end_at_once
from qrlora_deploy.cli.options import ANY_PATH, EXISTING_FILE, FOLDER, CustomerId, buckets_of, common, refuse_idle
from qrlora_deploy.cli.output import Output
from qrlora_deploy.cli.ranges import FiniteRange, WholeRange
from qrlora_deploy.cli.sections import SectionedCommand
from qrlora_deploy.cli.serve_check import checked
from qrlora_deploy.cli.serve_limits import SECONDS, limit_options
from qrlora_deploy.cli.serve_places import places_of
from qrlora_deploy.cli.serve_ray import check_ray_usage, open_ray_server, ray_options, serve_on_ray
from qrlora_deploy.errors import InputError
from qrlora_deploy.installation.parts import need

if TYPE_CHECKING:
    from qrlora_deploy.serving.assembly import Assembly, AssemblyOptions
    from qrlora_deploy.serving.opening import RunOptions
    from qrlora_deploy.serving.processes.supervisor import Supervisor
    from qrlora_deploy.serving.server import ServerOptions


SECTIONS = {
    "models": "Models and customers",
    "host": "Addresses",
    "provider": "Devices and processes",
    "max_rows": "Bounds",
    "keys": "Who may ask",
    "drain_delay": "The end",
    "on_ray": "Several machines, by Ray",
    "counted": "Watching and checking",
}
"""Titles of the help by the first option of each part."""


@click.command("serve", cls=SectionedCommand, sections=SECTIONS)
@click.argument("bundle", required=False, type=FOLDER)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME=BUNDLE",
    help="A model and its name, instead of BUNDLE or beside it; repeatable.",
)
@click.option(
    "--customers",
    multiple=True,
    metavar="[NAME=]DIR|URL",
    help="Folder of coefficients files, or their URL in an object store, such as s3://bucket/prefix; it is followed.",
)
@click.option(
    "--poll-seconds",
    "poll_s",
    type=FiniteRange(min=0.1, max=86_400),
    default=30.0,
    show_default=True,
    help="Seconds from one listing of an object store to the next.",
)
@click.option("--packed", multiple=True, metavar="[NAME=]FILE", help="Packed file of customers.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=WholeRange(0, 65535), default=8080, show_default=True, help="0: any free one.")
@click.option("--grpc-port", type=WholeRange(0, 65535), help="Answer over gRPC, too, on this port.")
@click.option(
    "--admin-port",
    type=WholeRange(0, 65535),
    help="Offer the admin API on this port, to keys with that right; needs --keys and --audit-log.",
)
@click.option("--admin-host", default="127.0.0.1", show_default=True, help="Address of the admin API.")
@click.option("--audit-log", type=ANY_PATH, help="With --admin-port: a line for each change is added to this file.")
@click.option("--provider", default="cpu", show_default=True, help="cpu, cuda, cuda:1 or tensorrt.")
@click.option("--device", "devices", multiple=True, help="As --provider; with --processes repeatable, an engine each.")
@click.option(
    "--provider-option",
    "provider_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Option of ONNX Runtime's provider, such as gpu_mem_limit=8589934592; repeatable.",
)
@click.option(
    "--processes",
    type=WholeRange(0, 256),
    default=0,
    help="Processes that talk to clients, beside one for each engine; 0: one process for all.",
)
@click.option(
    "--hang-seconds",
    "hang_s",
    type=SECONDS,
    default=60.0,
    show_default=True,
    help="A run may take, and one of --processes be silent, so long; then it is started again, or not live. 0: ever.",
)
@click.option(
    "--open-seconds",
    "open_s",
    type=SECONDS,
    default=600.0,
    show_default=True,
    help="A model, or a listing of customers, may take so long to open; then the server ends. 0: ever.",
)
@limit_options
@click.option("--keys", type=EXISTING_FILE, help="File of keys; without it everybody is answered.")
@click.option("--insecure", is_flag=True, help="Listen beyond this machine without keys.")
@click.option("--tls-cert", type=EXISTING_FILE, help="Certificates, PEM.")
@click.option("--tls-key", type=EXISTING_FILE, help="Key of the first one, PEM.")
@click.option("--tls-client-ca", type=EXISTING_FILE, help="Clients need a certificate that is signed by this one.")
@click.option(
    "--drain-delay", type=SECONDS, default=0.0, show_default=True, help="Seconds from SIGTERM on that all is answered."
)
@click.option(
    "--drain-seconds",
    "drain_s",
    type=SECONDS,
    default=45.0,
    show_default=True,
    help="Seconds after that for what was begun.",
)
@ray_options
@click.option(
    "--count-customer",
    "counted",
    multiple=True,
    type=CustomerId(),
    metavar="ID",
    help="Metrics and spans name this customer, and none but those; repeatable.",
)
@click.option("--otel", is_flag=True, help="Send OpenTelemetry spans, as the OTEL_ variables say.")
@click.option("--check", is_flag=True, help="Open and check everything, each customer's file too, and end.")
@click.option("--log-json", is_flag=True, help="Logs as lines of JSON on stderr, each request among them.")
@common
def command(
    bundle: Path | None, models: tuple[str, ...], check: bool, log_json: bool, on_ray: bool, **options: Any
) -> Output:
    """Answer over HTTP, and gRPC, for BUNDLE and its customers: Open Inference Protocol v2; plain JSON at /v1/classify.

    A decoder is asked as OpenAI's clients ask, at /v1/completions and /v1/chat/completions; its model is NAME:CUSTOMER.

    SIGTERM ends it without losing a request: readiness goes off, --drain-delay passes, what was begun is finished.
    SIGHUP reads the keys and the packed files again.

    \b
    Examples:
      qrlora-deploy serve bundle --customers customers
      qrlora-deploy serve bundle --customers s3://bucket/customers
      qrlora-deploy serve decoder-bundle --customers customers --max-answers 16 --max-cache-mib 2048
      qrlora-deploy serve bundle --customers customers --keys keys.json --host 0.0.0.0 --drain-delay 10
      qrlora-deploy serve --model intents=bundle --model spam=other-bundle --customers intents=customers --check
    """
    _check_usage(bundle, models, **options)
    check_ray_usage(on_ray, options)
    refuse_idle(["hang_s", "open_s"], not on_ray, "there is no --ray, which has a word for that of its own")
    if options["otel"]:
        need("otel", "`serve --otel`")
    from qrlora_deploy.serving.assembly import Assembly, AssemblyOptions
    from qrlora_deploy.serving.json_log import log_as_json, log_plainly
    from qrlora_deploy.serving.opening import merges_weights
    from qrlora_deploy.serving.opening_watch import OpeningWatch

    if log_json:
        log_as_json()
    else:
        log_plainly()
    places = places_of(bundle, models, options["customers"], options["packed"], options["poll_s"])
    run, server = _run_options(**options), _server_options(options)
    if options["merged_cache_mib"]:
        refuse_idle(["merged_cache_mib"], merges_weights(places), "a switchable bundle is there that writes no text")
    if on_ray and not check:
        on_replicas, names = open_ray_server(places, run, server, options), [place.name for place in places]
        return Output({}, live=lambda stream: serve_on_ray(on_replicas, names, stream))
    made_of = AssemblyOptions(
        places,
        run,
        server,
        keys=options["keys"],
        grpc_port=options["grpc_port"],
        admin_port=options["admin_port"],
        admin_host=options["admin_host"],
        audit_log=options["audit_log"],
        counted=options["counted"],
        processes=options["processes"],
        devices=options["devices"] if options["processes"] else (),
        otel=options["otel"],
        hang_s=options["hang_s"],
        open_s=options["open_s"],
    )
    with OpeningWatch(made_of.open_s, end_at_once) as watch:
        if check:
            return checked(made_of, watch.begin)
        if made_of.processes:
            from qrlora_deploy.serving.processes.supervisor import Supervisor

            watch.begin("what the bundles are for")
            return Output({}, live=partial(_serve, Supervisor(made_of, log_json), made_of))
        return Output({}, live=partial(_serve, Assembly(made_of, watch.begin), made_of))


def _check_usage(bundle: Path | None, models: Sequence[str], **options: Any) -> None:
    if bundle is None and not models:
        raise click.UsageError("give a BUNDLE, or --model NAME=BUNDLE")
    if len(options["devices"]) > 1 and not options["processes"]:
        raise click.UsageError("several --device need --processes N: an engine for each, N fronts for all")
    if bool(options["tls_cert"]) != bool(options["tls_key"]):
        raise click.UsageError("--tls-cert and --tls-key belong together")
    if options["tls_client_ca"] and not options["tls_cert"]:
        raise click.UsageError("--tls-client-ca needs --tls-cert and --tls-key")
    guarded = options["keys"] or options["tls_client_ca"] or options["insecure"]
    if not guarded and not _is_here(options["host"]):
        raise click.UsageError(
            f"--host {options['host']} lets everybody ask for every customer; give --keys FILE, or --insecure"
        )


def _is_here(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _run_options(**options: Any) -> "RunOptions":
    from qrlora_deploy.serving.engine.limits import Limits
    from qrlora_deploy.serving.opening import RunOptions

    limits = Limits(
        max_queue_rows=options["max_queue_rows"],
        max_queue_s=options["max_queue_ms"] / 1000,
        max_batch_tokens=options["max_batch_tokens"],
        max_wait_s=options["max_wait_ms"] / 1000,
    )
    buckets = None if options["buckets"] is None else buckets_of(options["buckets"])
    return RunOptions(
        options["devices"][0] if options["devices"] else options["provider"],
        _provider_options(options["provider_options"]),
        options["threads"],
        buckets,
        options["max_rows"],
        limits,
        options["max_answers"],
        options["max_cache_mib"] * 2**20,
        options["merged_cache_mib"] * 2**20,
    )


def _provider_options(texts: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise InputError(f"--provider-option {text!r:.80} must be KEY=VALUE, such as gpu_mem_limit=8589934592")
        if name in found:
            raise InputError(f"--provider-option {name!r:.80} is given twice; give it once")
        found[name] = value
    return found


def _server_options(options: dict[str, Any]) -> "ServerOptions":
    from qrlora_deploy.serving.http.limits import MIB, HttpLimits
    from qrlora_deploy.serving.server import ServerOptions, Tls

    cert, key, authority = options["tls_cert"], options["tls_key"], options["tls_client_ca"]
    return ServerOptions(
        host=options["host"],
        port=options["port"],
        tls=Tls(cert, key, authority) if cert and key else None,
        limits=HttpLimits(max_body_bytes=options["max_body_mib"] * MIB),
        drain_delay_s=options["drain_delay"],
        drain_s=options["drain_s"],
    )


def _serve(server: "Assembly | Supervisor", made_of: "AssemblyOptions", stream: IO[str]) -> None:
    def started() -> None:
        names = ", ".join(places.name for places in made_of.places)
        stream.write(f"serving {names} on {server.url}\n")
        for name, port in server.ports.items():
            stream.write(f"{name} on port {port}\n")
        stream.flush()

    server.run(started)
