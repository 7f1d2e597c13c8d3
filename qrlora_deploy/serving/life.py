"""Where a server is between its start and its end; the fronts of every protocol look here."""


class Life:
    """From starting over ready to draining. Safe for many threads.

    Attributes:
        ready: requests are welcome; a load balancer may send them.
        draining: the end has begun. Requests are still answered for a while, but connections are not kept.
    """

    def __init__(self) -> None:
        self.ready = False
        self.draining = False

    def begin(self) -> None:
        """Everything is loaded."""
        self.ready = not self.draining

    def drain(self) -> None:
        """The end begins."""
        self.ready, self.draining = False, True
