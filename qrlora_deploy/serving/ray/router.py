"""Where Ray Serve sends a call: to the replica that its customer belongs to, or the next one that is not busy.

No replica is the only one that has a customer: each can answer for all. So a customer's rows come together in one
queue and one table, and still nobody waits for a replica that is full or gone.
"""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from qrlora_deploy.serving.ray.calls import Call
from qrlora_deploy.serving.ray.rendezvous import ranked


class CustomerRouter(RequestRouter):
    """Ranks replicas by rendezvous hash of the call's customer; Ray takes the first that has room for a call.

    It is no `FIFOMixin`: that would give the replica that was chosen for one call to the call that came first.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """As `RequestRouter.choose_replicas`: groups of replicas, the best one first."""
        call = _call(pending_request)
        if call is None or pending_request is None:
            return [candidate_replicas]
        # Without this Ray asks full replicas again and again without a pause, whatever pauses are configured.
        pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        names = list(by_name.keys() - set(call.avoid)) or list(by_name)
        if call.customer is None:
            return [[by_name[name] for name in names]]
        best_first = [by_name[name] for name in ranked(call.customer, names)]
        # Ray asks each that it believes to be full, one after another and up to a tenth of a second each.
        free = {replica.replica_id for replica in self.select_available_replicas(best_first)}
        return [[replica] for replica in sorted(best_first, key=lambda replica: replica.replica_id not in free)]


def _call(request: PendingRequest | None) -> Call | None:
    arguments = request.args if request is not None else ()
    return arguments[0] if arguments and isinstance(arguments[0], Call) else None
