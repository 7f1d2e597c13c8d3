"""What a server on Ray is made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from qrlora_deploy.formats.customer_files import check_customer_id
from qrlora_deploy.serving.ray.replica import ReplicaOptions
from qrlora_deploy.serving.ray.scaling import Scaling
from qrlora_deploy.serving.server import ServerOptions


@dataclass(frozen=True)
class RayOptions:
    """What an application is made of.

    Attributes:
        replica: what each replica is made of.
        scaling: how many there are.
        app: name of the application in Ray Serve.
        cpus: that Ray reserves for each replica.
        gpus: the same.
        max_calls: in a replica at a time; more go to the next one.
        max_waiting_calls: in a front, while all replicas have as many as they take; then 429.
        drain_s: for a replica that is stopped to answer what it has.
    """

    replica: ReplicaOptions
    scaling: Scaling = field(default_factory=Scaling)
    app: str = "qrlora"
    cpus: float = 1.0
    gpus: float = 0.0
    max_calls: int = 256
    max_waiting_calls: int = 4096
    drain_s: float = 45.0


@dataclass(frozen=True)
class RayServerOptions:
    """A front and its replicas.

    Attributes:
        app: the replicas.
        server: where the front listens, and how its process ends.
        ray_address: of a Ray that runs; None: one is started here, and ends with the front.
        counted: customers whose rows metrics tell by name.

    Raises:
        InputError: one of them is no customer's id.
    """

    app: RayOptions
    server: ServerOptions = field(default_factory=ServerOptions)
    ray_address: str | None = None
    counted: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in self.counted:
            check_customer_id(name)
