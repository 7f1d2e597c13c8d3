"""Where a server is between its start and its end; the fronts of every protocol look here."""

from qrlora_deploy.serving.refusals import DrainingError


class Life:
    """From starting over ready to draining. Safe for many threads.

    Attributes:
        ready: requests are welcome; a load balancer may send them.
        draining: the end has begun. Requests are still answered for a while, but connections are not kept.
    """

    def __init__(self) -> None:
        self.ready = False
        self.draining = False

    @property
    def state(self) -> str:
        """ "starting", "ready" or "draining"."""
        return "draining" if self.draining else "ready" if self.ready else "starting"

    def begin(self) -> None:
        """Everything is loaded."""
        self.ready = not self.draining

    def drain(self) -> None:
        """The end begins."""
        self.ready, self.draining = False, True

    def check(self) -> None:
        """Make sure that requests can be answered: while a server drains it still answers who has not heard of it.

        Raises:
            DrainingError: it is not ready yet.
        """
        if not (self.ready or self.draining):
            raise DrainingError("the server is not ready yet; try again soon")
