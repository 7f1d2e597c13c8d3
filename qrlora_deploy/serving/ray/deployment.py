"""The application for Ray Serve: what its controller keeps alive, scales and replaces."""

import math
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import ray.exceptions as lost
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.ray.calls import Call, Part, Reply
from qrlora_deploy.serving.ray.options import RayOptions
from qrlora_deploy.serving.ray.replica import Replica, ReplicaOptions
from qrlora_deploy.serving.ray.router import CustomerRouter
from qrlora_deploy.serving.ray.scaling import QUEUED_ROWS, Scaling, wanted
from qrlora_deploy.serving.refusals import DrainingError, LostError, OverloadedError

NAME = "replicas"
"""Of the deployment."""

LOST = (
    lost.RayActorError,
    lost.WorkerCrashedError,
    lost.NodeDiedError,
    lost.ObjectLostError,
    ReplicaUnavailableError,
)
"""What Ray says of a call whose replica, or its machine, has ended."""

STATS_S = 5.0
"""For replicas to tell their counters."""


class ServedReplica:
    """`Replica` as Ray Serve wants it.

    Args:
        options: what it is made of.
    """

    def __init__(self, options: ReplicaOptions) -> None:
        self._replica = Replica(options, serve.get_replica_context().replica_id.unique_id)

    async def __call__(self, call: Call) -> Reply:
        """Answer a request."""
        return await self._replica.answer(call)

    async def parts(self, call: Call) -> AsyncGenerator[Reply | Part]:
        """Answer a request as its body comes."""
        async with aclosing(self._replica.parts(call)) as parts:
            async for part in parts:
                yield part

    def stats(self) -> dict[str, EngineStats]:
        """As `Replica.stats`."""
        return self._replica.stats()

    def reload(self) -> str | None:
        """As `Replica.reload`."""
        return self._replica.reload()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray Serve collects for the policy."""
        return {QUEUED_ROWS: float(self._replica.queued_rows())}

    def check_health(self) -> None:
        """As `Replica.check`; Ray Serve replaces a replica that fails."""
        self._replica.check()

    def __del__(self) -> None:
        # Ray Serve calls this once the replica has answered everything.
        if hasattr(self, "_replica"):
            self._replica.close()


class ByQueuedRows:
    """Policy of Ray Serve: as many replicas as the rows that wait in them need.

    Args:
        rows: that may wait in each.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Replicas that are wanted; Ray Serve keeps the bounds and the delays."""
        told = (context.aggregated_metrics or {}).get(QUEUED_ROWS, {})
        return wanted(told.values(), context.current_num_replicas, self._rows), {}


def application(options: RayOptions) -> serve.Application:
    """The application, for `ray.serve.run`.

    Replicas are replaced one after another, a new one answering before an old one stops, so the cluster needs room for
    one more while it is upgraded.
    """
    return serve.deployment(ServedReplica).options(**_settings(options)).bind(options.replica)


def _settings(options: RayOptions) -> dict[str, Any]:
    least, most = options.scaling.replicas
    number = {"num_replicas": most} if least == most else {"autoscaling_config": _autoscaling(options.scaling)}
    return number | {
        "name": NAME,
        "max_ongoing_requests": options.max_calls,
        "max_queued_requests": options.max_waiting_calls,
        "request_router_config": RequestRouterConfig(request_router_class=CustomerRouter),
        "ray_actor_options": {"num_cpus": options.cpus, "num_gpus": options.gpus},
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": options.drain_s,
        "max_surge_percent": max(1, math.floor(100 / most)),
        "logging_config": LoggingConfig(enable_access_log=False),
    }


def _autoscaling(scaling: Scaling) -> AutoscalingConfig:
    least, most = scaling.replicas
    return AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        initial_replicas=least,
        upscale_delay_s=scaling.up_s,
        downscale_delay_s=scaling.down_s,
        look_back_period_s=max(1.0, 1.5 * scaling.up_s),
        policy=AutoscalingPolicy(policy_function=ByQueuedRows, policy_kwargs={"rows": scaling.queued_rows}),
    )


class RayReplicas:
    """The replicas of an application that runs, as a front asks them.

    Args:
        handle: of the deployment.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._in_parts = handle.options(method_name="parts", stream=True)

    async def ask(self, call: Call) -> Reply:
        """As `Replicas.ask`."""
        with _as_refusals():
            response = self._handle.remote(call)
            try:
                return await response
            except BaseException:
                response.cancel()
                raise

    async def parts(self, call: Call) -> AsyncGenerator[Reply | Part]:
        """As `Replicas.parts`."""
        with _as_refusals():
            response = self._in_parts.remote(call)
            try:
                async for part in response:
                    yield part
            except BaseException:
                response.cancel()
                raise

    async def stats(self) -> list[dict[str, EngineStats]]:
        """As `Replicas.stats`."""
        try:
            told = await self._handle.broadcast("stats").results_async(timeout_s=STATS_S, return_exceptions=True)
        except (RayServeException, TimeoutError):
            return []
        # One that ends meanwhile has nothing to tell.
        return [stats for stats in told if isinstance(stats, dict)]

    def reload(self) -> list[str]:
        """Let every replica read its keys, folders and packed files again; what is wrong, one line each."""
        return [line for line in self._handle.broadcast("reload").results() if line]


@contextmanager
def _as_refusals() -> Iterator[None]:
    try:
        yield
    except LOST as error:
        raise LostError("the replica ended before it answered; ask again") from error
    except BackPressureError as error:
        raise OverloadedError("all replicas are busy; try again soon") from error
    except DeploymentUnavailableError as error:
        raise DrainingError("there are no replicas; try again soon") from error
