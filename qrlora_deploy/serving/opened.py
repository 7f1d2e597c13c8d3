"""What answers requests in one process without connections: models, keys and quotas, and the HTTP front over them."""

from collections.abc import Sequence
from pathlib import Path

from qrlora_deploy.serving.assembly import AssemblyOptions, EngineParts
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.metrics import Metrics
from qrlora_deploy.serving.opening import ModelPlaces, RunOptions
from qrlora_deploy.serving.served import Models


class OpenedFront:
    """A front with everything that it needs, open.

    Args:
        places: of the models; the first one answers where a request names none.
        run: how they run.
        keys: file of keys; None: everybody is answered.

    Attributes:
        front: answers.

    Raises:
        QrloraError: something cannot be used; what was opened before is closed.
    """

    def __init__(self, places: Sequence[ModelPlaces], run: RunOptions, keys: Path | None = None) -> None:
        self._parts = parts = EngineParts(AssemblyOptions(places, run, keys=keys))
        try:
            models = Models([model.served for model in parts.models])
        except BaseException:
            parts.close()
            raise
        self.front = Front(models, keys=parts.keys, metrics=Metrics(list(models), (), parts.stores()))

    def reload(self) -> None:
        """As `EngineParts.reload`."""
        self._parts.reload()

    def close(self) -> None:
        """As `EngineParts.close`."""
        self._parts.close()
