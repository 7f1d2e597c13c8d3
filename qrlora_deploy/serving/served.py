"""The models of a server: what the fronts of every protocol are given."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from qrlora_deploy.data.labels import quoted
from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.runtime.bundle.bundle import Bundle
from qrlora_deploy.serving.engine.protocol import Engine, EngineStats
from qrlora_deploy.serving.tokenizing import RowTokenizer
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.registry import task_named

if TYPE_CHECKING:
    from qrlora_deploy.serving.generation.protocol import TextWriter

VERSION = "1"
"""Of every model: a bundle is sealed, so another one is another model."""


class UnknownModelError(QrloraError):
    """There is no model of that name."""

    kind = "not_found"


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(2, os.cpu_count() or 1), thread_name_prefix="tokenising")


@dataclass(frozen=True)
class ServedModel:
    """A bundle that is answered for.

    Attributes:
        name: in URLs.
        bundle: what is served.
        engine: answers.
        tokenizer: makes rows of texts, in threads of `pool`.
        writer: `engine`, of a model that writes text; None: it answers rows.
    """

    name: str
    bundle: Bundle
    engine: Engine
    tokenizer: RowTokenizer
    pool: ThreadPoolExecutor = field(default_factory=_pool, repr=False, compare=False)
    writer: "TextWriter | None" = None

    @cached_property
    def task(self) -> Task:
        """Of the bundle."""
        return task_named(self.bundle.manifest.task)

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self.engine.stats().draining


class Models:
    """Models by name; the first one answers where none is named.

    Raises:
        InputError: there is none, or two have one name.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.name: model for model in models}
        if not models or len(self._models) < len(models):
            raise InputError("a server needs models, each with a name of its own")

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def stats(self) -> dict[str, EngineStats]:
        """Counters of each model's engine."""
        return {name: model.engine.stats() for name, model in self._models.items()}

    def check_room(self) -> None:
        """As `Engine.check_room`, before it is read which model is asked: where there is one alone.

        Raises:
            OverloadedError: it has no room.
        """
        if len(self._models) == 1:
            next(iter(self)).engine.check_room()

    def find(self, name: str | None, version: str | None = None) -> ServedModel:
        """The model of a name; the first one where a request names none.

        Raises:
            UnknownModelError: there is none, or not in this version.
        """
        if name is None:
            return next(iter(self))
        if name not in self._models:
            raise UnknownModelError(f"there is no model {name!r:.80}; this server has {quoted(self._models)}")
        if version not in (None, "", VERSION):
            raise UnknownModelError(f"the model {name!r} has the version {VERSION} alone, not {version!r:.40}")
        return self._models[name]
