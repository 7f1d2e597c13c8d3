"""The life of a front whose replicas Ray keeps: Ray is started or found, and the application deployed or found."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from qrlora_deploy.errors import InputError, QrloraError, argument
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.serving.access import Keys
from qrlora_deploy.serving.opened import OpenedFront
from qrlora_deploy.serving.opening import ModelPlaces
from qrlora_deploy.serving.ray.deployment import NAME, RayReplicas, application
from qrlora_deploy.serving.ray.options import RayOptions, RayServerOptions
from qrlora_deploy.serving.ray.relay import RelayFront
from qrlora_deploy.serving.ray.replica import ReplicaOptions
from qrlora_deploy.serving.server import Server

OBJECT_STORE_BYTES = 512 * 2**20
"""Of a Ray that is started here: it holds bodies on their way, and nothing else."""

FAILED = (ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.DELETING)

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}

LOGGERS = ("ray", "ray.serve")


class RayServer:
    """A front of replicas, which are answering.

    In a Ray that ran before, replicas of that name are taken as they are, and they stay when the front ends: other
    fronts may have them too.

    Attributes:
        server: to be run.

    Raises:
        InputError: a bundle, the keys or the address cannot be used, or there is no Ray at its address.
        QrloraError: the replicas do not start.
    """

    def __init__(self, options: RayServerOptions) -> None:
        self._options, replica = options, options.app.replica
        self._keys = Keys.open(replica.keys) if replica.keys is not None else None
        self._seals = _seals(replica.places)
        _check(replica)
        _begin_ray(options)
        try:
            self._replicas = RayReplicas(_deployed(options.app))
            front = RelayFront(self._replicas, self._keys, options.counted)
            self.server = Server(front, options.server, self.reload)
        except BaseException:
            self.close()
            raise

    def run(self, started: Callable[[], None]) -> None:
        """Serve until a signal ends it; as `Server.run`."""
        try:
            self.server.run(started)
        finally:
            self.close()

    def reload(self) -> None:
        """Replace the replicas, one after another, where a bundle is another one; else let them read their files again.

        Raises:
            QrloraError: something cannot be used; what was there before goes on.
        """
        if self._keys is not None:
            self._keys.reload()
        replica = self._options.app.replica
        seals = _seals(replica.places)
        if seals == self._seals:
            if wrong := self._replicas.reload():
                raise QrloraError("; ".join(wrong))
            return
        _check(replica)
        _run(self._options.app)
        self._seals = seals

    def close(self) -> None:
        """End what was started here. Twice is no error."""
        if hasattr(self, "server"):
            self.server.http.close()
        # A Ray that was started here ends with all of its processes.
        ray.shutdown()


def _check(options: ReplicaOptions) -> None:
    """Open everything once, on the CPU: where replicas cannot start, Ray Serve tries for long and then answers nobody.

    Raises:
        QrloraError: something cannot be used.
    """
    places = [place for place in options.places if not _only_on_a_gpu(place, options.run.provider)]
    if places:
        OpenedFront(places, replace(options.run, provider="cpu", buckets=None), options.keys).close()


def _only_on_a_gpu(place: ModelPlaces, provider: str) -> bool:
    """Whether a bundle, which is whole, computes in what processors may not: decoders that are served on GPUs do.

    Raises:
        QrloraError: it cannot be used.
    """
    return provider != "cpu" and open_bundle(place.bundle).manifest.deciding_task.writes_text


def _begin_ray(options: RayServerOptions) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    here = {
        "num_cpus": _cpus(options.app),
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    try:
        if options.ray_address is not None:
            ray.init(options.ray_address, **QUIET)
        else:
            ray.init("local", **here, **QUIET)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if options.ray_address is None:
            raise QrloraError(f"Ray cannot be started here: {error}") from error
        place = argument("ray_address", options.ray_address)
        raise InputError(f"{place}: {error}; where it asks for a token, set RAY_AUTH_MODE=token") from error
    # Requests come by our own front, which has keys, bounds and TLS.
    serve.start(proxy_location="Disabled")


def _cpus(app: RayOptions) -> int:
    """For Ray to believe in: on one machine as many replicas start as are asked for, and one more in an upgrade."""
    return max(os.cpu_count() or 1, math.ceil(app.cpus * (app.scaling.replicas[1] + 1)))


def _deployed(app: RayOptions) -> DeploymentHandle:
    found = serve.status().applications.get(app.app)
    if found is not None and found.status not in FAILED:
        return serve.get_deployment_handle(NAME, app.app)
    return _run(app)


def _run(app: RayOptions) -> DeploymentHandle:
    try:
        return serve.run(application(app), name=app.app, route_prefix=None)
    except RuntimeError as error:
        # Ray's message holds the traceback of the replica, whose last line is ours.
        lines = [line.strip() for line in str(error).splitlines() if "Error: " in line]
        raise QrloraError(f"the replicas do not start: {lines[-1] if lines else error}") from error


def _seals(places: Sequence[ModelPlaces]) -> list[str]:
    """What changes when a bundle does: its manifest names the content of all its files."""
    try:
        return [sha256((place.bundle / "manifest.json").read_bytes()).hexdigest() for place in places]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
