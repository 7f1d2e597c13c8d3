"""The engines of all replicas together, as metrics ask for those of one process."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.metrics import Served


@dataclass(frozen=True)
class _Engines:
    """Those of a model."""

    found: EngineStats

    def stats(self) -> EngineStats:
        """The sums."""
        return self.found


@dataclass(frozen=True)
class _Total:
    """A model in all replicas."""

    name: str
    engine: _Engines


class Totals:
    """Models with the sums of what their replicas have told last. A replica that ends takes its counts along."""

    def __init__(self) -> None:
        self._models: list[Served] = []

    def __iter__(self) -> Iterator[Served]:
        return iter(self._models)

    def take(self, replicas: Iterable[Mapping[str, EngineStats]]) -> None:
        """What each replica tells, by the model's name."""
        found: dict[str, EngineStats] = {}
        for replica in replicas:
            for model, stats in replica.items():
                found[model] = added(found.get(model, EngineStats()), stats)
        self._models = [_Total(name, _Engines(stats)) for name, stats in found.items()]


def added(one: EngineStats, other: EngineStats) -> EngineStats:
    """The sum of two engines' counters."""
    names = [field.name for field in fields(EngineStats) if field.name not in ("rejected", "draining", "last_run_s")]
    rejected = Counter(dict(one.rejected)) + Counter(dict(other.rejected))
    return EngineStats(
        **{name: getattr(one, name) + getattr(other, name) for name in names},
        rejected=tuple(sorted(rejected.items())),
        draining=one.draining or other.draining,
        last_run_s=max(one.last_run_s, other.last_run_s),
    )
