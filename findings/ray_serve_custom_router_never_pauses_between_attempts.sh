#!/usr/bin/env bash
# Ray Serve 2.60.0: while all replicas are full, a custom request router is asked for replicas without a pause, hundreds of
# times a second, although RequestRouterConfig sets initial_backoff_s and max_backoff_s to half a second: the pauses are
# made only where the router itself sets `pending_request.routing_context.should_backoff`, which the base class leaves
# False. A router that sets it is asked about twice a second. Seen on Linux, Python 3.11.
#
# Expected by a reader of RequestRouterConfig ("Initial backoff time (in seconds) before retrying to route a request to a
# replica") and of RequestRouter ("choose_replicas ... is the main function each request router should implement"):
# the pauses are those of the configuration, for any router.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'ray[serve]==2.60.0'
cd "$scratch"
export RAY_USAGE_STATS_ENABLED=0
cat > routed.py <<'PYTHON'
from ray.serve.request_router import RequestRouter

class Plain(RequestRouter):
    asked = 0

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        type(self).asked += 1
        return [candidate_replicas]

class Pausing(Plain):
    asked = 0

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        pending_request.routing_context.should_backoff = True
        return await super().choose_replicas(candidate_replicas, pending_request)

class Replica:
    async def __call__(self, seconds):
        import asyncio
        await asyncio.sleep(seconds)
PYTHON
PYTHONPATH=$scratch "$scratch/venv/bin/python" - <<'PYTHON'
import logging
import time
import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from routed import Pausing, Plain, Replica

ray.init(num_cpus=4, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
logging.getLogger("ray.serve").setLevel(logging.ERROR)
serve.start(proxy_location="Disabled")

def asked_while_full(router) -> int:
    """How often the router is asked in five seconds, for one request that waits for the only replica."""
    config = RequestRouterConfig(request_router_class=router, initial_backoff_s=0.5, max_backoff_s=0.5)
    settings = serve.deployment(Replica).options(num_replicas=1, max_ongoing_requests=1, request_router_config=config)
    handle = serve.run(settings.bind(), name=router.__name__, route_prefix=None)
    handle.remote(0).result()
    running = handle.remote(8)
    time.sleep(1)
    waiting = handle.remote(0)
    time.sleep(1)
    # The handle's router runs in this process.
    before = router.asked
    time.sleep(5)
    count = router.asked - before
    running.result(), waiting.result()
    return count

found = {router.__name__: asked_while_full(router) for router in (Plain, Pausing)}
print("ray", ray.__version__, "asks in five seconds, with pauses of half a second configured:", found)
ray.shutdown()
assert 1 <= found["Pausing"] <= 12, "the behaviour changed"
assert found["Plain"] > 100, "the behaviour changed"
PYTHON
