"""From a bundle and its customers on the disk to a model that is served."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qrlora_deploy.errors import InputError, QrloraError, argument
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.formats.customer_files import customer_ids, read_customer
from qrlora_deploy.runtime.bundle.bundle import Bundle, open_bundle
from qrlora_deploy.runtime.customers.objects.store import POLL_S, ObjectStoreStats
from qrlora_deploy.runtime.customers.packed_erasing import erase_packed
from qrlora_deploy.runtime.generation.session import GenerationSession
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.sessions.buckets import Buckets
from qrlora_deploy.runtime.sessions.loaded_customers import LoadedCustomers
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.customer_folder import CustomerFolder
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.local import LocalEngine
from qrlora_deploy.serving.engine.models import MergedModel
from qrlora_deploy.serving.engine.quotas import Quotas
from qrlora_deploy.serving.engine.sources import ObjectSource, source_of
from qrlora_deploy.serving.generation.engine import TextEngine
from qrlora_deploy.serving.opening_watch import Begin, unwatched
from qrlora_deploy.serving.served import ServedModel
from qrlora_deploy.serving.tokenizing import RowTokenizer

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class RunOptions:
    """How a model runs.

    Attributes:
        provider: "cpu", "cuda", "cuda:1" or "tensorrt".
        provider_options: for the provider, such as {"gpu_mem_limit": "8589934592"}.
        threads: within an operator; None: ONNX Runtime's choice.
        buckets: shapes to run in; None: whatever comes.
        max_rows: of the coefficient table; None: it grows.
        limits: of the engine.
        max_answers: that a decoder writes side by side.
        max_cache_bytes: memory of a decoder's keys and values.
        merged_cache_bytes: memory of merged weights, as for `SwitchableSession`.
    """

    provider: str = "cpu"
    provider_options: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    buckets: Buckets | None = None
    max_rows: int | None = None
    limits: Limits = field(default_factory=Limits)
    max_answers: int = 8
    max_cache_bytes: int = 2**30
    merged_cache_bytes: int = 0

    @property
    def device(self) -> Device:
        """Where it runs.

        Raises:
            ProviderError: there is no such device.
        """
        return replace(Device.of(self.provider), provider_options=self.provider_options)


@dataclass(frozen=True)
class ModelPlaces:
    """Where a model lies.

    Attributes:
        name: in URLs.
        bundle: folder.
        customers: folder of coefficients files, which is followed; None: there is none.
        packed: file of many customers; None: there is none.
        objects: URL of customers in an object store, in place of a folder; None: there is none.
        poll_s: seconds from one listing of the object store to the next.

    Raises:
        InputError: the name cannot stand in a URL.
    """

    name: str
    bundle: Path
    customers: Path | None = None
    packed: Path | None = None
    objects: str | None = None
    poll_s: float = POLL_S

    def __post_init__(self) -> None:
        if not MODEL_NAME.fullmatch(self.name):
            raise InputError(
                f"{self.name!r:.140} cannot be the name of a model: A-Z a-z 0-9 . _ - are allowed; name it: "
                f"qrlora-deploy serve --model NAME={self.bundle}"
            )


class OpenModel:
    """A model, open: its session, its customers and its engine.

    Attributes:
        places: where it came from.
        session: what runs.
        customers: its customers; None: it is merged and takes none.
        served: what fronts are given.

    Raises:
        QrloraError: the bundle, the packed file or the folder cannot be used.
    """

    def __init__(
        self, places: ModelPlaces, options: RunOptions, quotas: Quotas | None = None, begin: Begin = unwatched
    ) -> None:
        self.places = places
        begin(f"{places.bundle}, the bundle of {places.name}, on {options.provider}")
        bundle = open_bundle(places.bundle)
        self.session = _open_session(bundle, options)
        self.customers = _customers_of(self.session)
        self._objects = None if places.objects is None else ObjectSource(places.objects, poll_s=places.poll_s)
        self._source = source_of(places.customers, places.packed, self._objects)
        if self.customers is not None:
            begin(f"{places.customers or places.objects or places.packed}, with the customers of {places.name},")
            self._source.open(self.customers)
        elif places.customers or places.packed or places.objects:
            raise InputError(f"{places.bundle} is a merged bundle: it holds one customer and takes no others")
        begin("")
        self.served = _served(places.name, self.session, options.limits, quotas)

    def customer_folder(self, erased: Callable[[str], None] = lambda customer: None) -> CustomerFolder | None:
        """The folder of customers, for who changes it; None: there is none.

        Args:
            erased: called with a customer that was taken from memory.
        """
        if self.places.customers is None or self.customers is None:
            return None

        def forget(customer: str) -> bool:
            found = self._forget(customer)
            erased(customer)
            return found

        return CustomerFolder(self.places.customers, self.customers.check, elsewhere=forget)

    def unload(self, customer: str) -> bool:
        """Take a customer, whose file is gone, from memory; whether it was there."""
        return self.customers is not None and self.customers.unload(customer)

    def _forget(self, customer: str) -> bool:
        """Take a customer, whose file is gone, from the packed file and from memory; whether it was there.

        Raises:
            InputError: the packed file is damaged, or holds nobody else.
        """
        packed = self.places.packed is not None and erase_packed(self.places.packed, customer)
        loaded = self.unload(customer)
        return packed or loaded

    def reload(self) -> None:
        """See at once what has changed in the folder, and load the packed file again.

        Raises:
            InputError: it is damaged or of another bundle; what was loaded before stays.
        """
        if self.customers is not None:
            self._source.reload()

    @property
    def object_stats(self) -> Callable[[], ObjectStoreStats] | None:
        """Says how the object store of its customers is doing; None: there is none."""
        return None if self._objects is None else self._objects.stats

    def check_customers(self, begin: Begin = unwatched) -> tuple[int, list[str]]:
        """Read every file of the folder, or object, and hold it against the bundle.

        Args:
            begin: told what is read.

        Returns:
            How many there are, and what is wrong with those that cannot be served, one line each.
        """
        if self.customers is None:
            return 0, []
        begin(f"{self.places.customers or self.places.objects}, with the customers of {self.places.name},")
        names, read = self._customers()
        check, problems = self.customers.check, []
        for name in names:
            begin(f"the file of {name}, a customer of {self.places.name},")
            try:
                check(read(name), name)
            except QrloraError as error:
                problems.append(f"{name}: {error}")
        return len(names), problems

    def _customers(self) -> tuple[list[str], Callable[[str], Coefficients]]:
        """The ids of files or objects, sorted, and what reads one."""
        folder = self.places.customers
        if folder is not None:
            return sorted(customer_ids(folder)), lambda name: read_customer(folder, name)
        if self._objects is not None:
            bucket = self._objects.bucket
            return sorted(name for page in bucket.pages() for name, _ in page), bucket.coefficients
        return [], lambda name: read_customer(Path(), name)

    def close(self) -> None:
        """Let go of the customers and end the engine."""
        self._source.close()
        self.served.engine.close()
        self.served.pool.shutdown(wait=False)


Session = SwitchableSession | MergedModel | GenerationSession


def _open_session(bundle: Bundle, options: RunOptions) -> Session:
    if bundle.manifest.deciding_task.writes_text:
        return _open_decoder(bundle, options)
    if bundle.manifest.kind == "merged":
        return MergedModel(bundle, options.device, options.threads, options.buckets)
    return SwitchableSession(
        bundle,
        options.device,
        max_rows=options.max_rows,
        threads=options.threads,
        buckets=options.buckets,
        merged_cache_bytes=options.merged_cache_bytes,
    )


def _open_decoder(bundle: Bundle, options: RunOptions) -> GenerationSession:
    if options.buckets is not None:
        raise InputError(f"{bundle.folder} writes text, in batches of its own; leave out {argument('buckets')}")
    return GenerationSession(
        bundle,
        options.device,
        max_rows=options.max_answers,
        max_cache_bytes=options.max_cache_bytes,
        customer_rows=options.max_rows,
        threads=options.threads,
    )


def _customers_of(session: Session) -> LoadedCustomers | None:
    if isinstance(session, GenerationSession):
        return session.customers
    return session if isinstance(session, SwitchableSession) else None


def _served(name: str, session: Session, limits: Limits, quotas: Quotas | None) -> ServedModel:
    bundle = session.bundle
    if isinstance(session, GenerationSession):
        writer = TextEngine(session, limits, quotas)
        return ServedModel(name, bundle, writer, RowTokenizer(bundle), writer=writer)
    return ServedModel(name, bundle, LocalEngine(session, limits, quotas), RowTokenizer(bundle))


def check_merged_cache(places: Sequence[ModelPlaces]) -> None:
    """Make sure that some model has a use for merged weights.

    Raises:
        InputError: none has: all of them are merged, or write text.
    """
    manifests = [open_bundle(place.bundle, graph=False).manifest for place in places]
    if not any(one.kind == "switchable" and not one.deciding_task.writes_text for one in manifests):
        names = ", ".join(str(place.bundle) for place in places)
        raise InputError(
            f"{argument('merged_cache_mib')} does nothing for {names}: merged, or writes text; leave it out"
        )
