"""What answers requests in one process: models, keys and quotas, open, and the HTTP front over them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from qrlora_deploy.runtime.customers.objects.store import ObjectStoreStats
from qrlora_deploy.serving.access import Keys
from qrlora_deploy.serving.engine.quotas import Quotas
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.metrics import Metrics
from qrlora_deploy.serving.opening import ModelPlaces, OpenModel, RunOptions
from qrlora_deploy.serving.served import Models


class OpenedFront:
    """A front with everything that it needs, open.

    Args:
        places: of the models; the first one answers where a request names none.
        run: how they run.
        keys: file of keys; None: everybody is answered.
        counted: customers whose rows metrics tell by name.

    Attributes:
        models: open; none after `close`.
        keys: None: everybody is answered.
        front: answers.

    Raises:
        QrloraError: something cannot be used; what was opened before is closed.
    """

    def __init__(
        self, places: Sequence[ModelPlaces], run: RunOptions, keys: Path | None = None, counted: Sequence[str] = ()
    ) -> None:
        self.models: list[OpenModel] = []
        self._quotas: list[Quotas] = []
        # Files that are quick to read come first: who misspells one need not wait for a model.
        self.keys = Keys.open(keys, self._change_quotas) if keys is not None else None
        try:
            for place in places:
                self._quotas.append(Quotas())
                self.models.append(OpenModel(place, run, self._quotas[-1]))
            if self.keys is not None:
                self._change_quotas(self.keys)
            models = Models([model.served for model in self.models])
        except BaseException:
            self.close()
            raise
        self.front = Front(models, keys=self.keys, metrics=Metrics(list(models), counted, self._stores()))

    def _stores(self) -> dict[str, Callable[[], ObjectStoreStats]]:
        return {model.served.name: ask for model in self.models if (ask := model.object_stats) is not None}

    def _change_quotas(self, keys: Keys) -> None:
        for quotas in self._quotas:
            quotas.change(*keys.quotas())

    def reload(self) -> None:
        """Read keys, folders and packed files again.

        Raises:
            InputError: a packed file cannot be used; what was loaded before stays.
        """
        if self.keys is not None:
            self.keys.reload()
        for model in self.models:
            model.reload()

    def close(self) -> None:
        """Let go of the customers and end the engines. Twice is no error."""
        for model in self.models:
            model.close()
        self.models = []
