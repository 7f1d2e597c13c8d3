#!/usr/bin/env bash
# Ray Serve 2.60.0: a request router that mixes in `FIFOMixin` (as Ray's own examples of custom routers do) and ranks one
# replica for each request finds requests in other replicas. What `choose_replicas` returns for one request is given
# to the request that came first and still waits, whatever was returned for that one. Without the mixin each
# request runs where its router sent it. Seen on Linux, Python 3.11.
#
# Expected by a reader of "Mixin for FIFO routing. This mixin is used to route requests in FIFO order": an order in time; a
# request that may run in one replica alone waits for it.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'ray[serve]==2.60.0'
cd "$scratch"
export RAY_USAGE_STATS_ENABLED=0
cat > routed.py <<'PYTHON'
from ray import serve
from ray.serve.request_router import FIFOMixin, RequestRouter

class ByKey(RequestRouter):
    """Offers the first replica by id to key "a", and the last one to key "b": one replica each, and no other."""

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        by_id = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        return [[by_id[0 if pending_request.args[0] == "a" else -1]]]

class ByKeyInOrder(FIFOMixin, ByKey):
    pass

class Replica:
    async def __call__(self, key, seconds):
        import asyncio
        await asyncio.sleep(seconds)
        return serve.get_replica_context().replica_id.unique_id
PYTHON
PYTHONPATH=$scratch "$scratch/venv/bin/python" - <<'PYTHON'
import time
import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from routed import ByKey, ByKeyInOrder, Replica

ray.init(num_cpus=4, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
serve.start(proxy_location="Disabled")

def places(router) -> dict[str, str]:
    """Which replica had three requests: one of "a" that takes long, one more of "a", one of "b"."""
    settings = serve.deployment(Replica).options(
        num_replicas=2, max_ongoing_requests=1, request_router_config=RequestRouterConfig(request_router_class=router)
    )
    handle = serve.run(settings.bind(), name=router.__name__, route_prefix=None)
    names = sorted({handle.remote(key, 0).result() for key in "ab"})
    assert len(names) == 2
    asked = []
    for key, seconds in (("a", 6), ("a", 0), ("b", 0)):
        asked.append(handle.remote(key, seconds))
        time.sleep(1)
    found = ["ab"[names.index(one.result())] for one in asked]
    return dict(zip(("first a", "second a", "b"), found))

found = {router.__name__: places(router) for router in (ByKey, ByKeyInOrder)}
print("ray", ray.__version__, "runs each request in the replica of:", found)
ray.shutdown()
assert found["ByKey"] == {"first a": "a", "second a": "a", "b": "b"}, "the behaviour changed"
assert found["ByKeyInOrder"]["second a"] == "b", "the behaviour changed"
PYTHON
