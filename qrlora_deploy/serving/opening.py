"""From a bundle and its customers on the disk to a model that is served."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.formats.customer_files import customer_ids, read_customer
from qrlora_deploy.runtime.bundle.bundle import Bundle, open_bundle
from qrlora_deploy.runtime.customers.packed import load_packed
from qrlora_deploy.runtime.customers.store import CustomerStore
from qrlora_deploy.runtime.sessions.buckets import Buckets
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.serving.customer_folder import CustomerFolder
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.local import LocalEngine
from qrlora_deploy.serving.engine.models import MergedModel
from qrlora_deploy.serving.served import ServedModel
from qrlora_deploy.serving.tokenizing import RowTokenizer

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class RunOptions:
    """How a model runs.

    Attributes:
        provider: "cpu", "cuda", "cuda:1" or "tensorrt".
        threads: within an operator; None: ONNX Runtime's choice.
        buckets: shapes to run in; None: whatever comes.
        max_rows: of the coefficient table; None: it grows.
        limits: of the engine.
    """

    provider: str = "cpu"
    threads: int | None = None
    buckets: Buckets | None = None
    max_rows: int | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class ModelPlaces:
    """Where a model lies.

    Attributes:
        name: in URLs.
        bundle: folder.
        customers: folder of coefficients files, which is followed; None: there is none.
        packed: file of many customers; None: there is none.

    Raises:
        InputError: the name cannot stand in a URL.
    """

    name: str
    bundle: Path
    customers: Path | None = None
    packed: Path | None = None

    def __post_init__(self) -> None:
        if not MODEL_NAME.fullmatch(self.name):
            raise InputError(
                f"{self.name!r:.140} cannot be the name of a model: A-Z a-z 0-9 . _ - are allowed; name it by "
                f"--model NAME={self.bundle}"
            )


class OpenModel:
    """A model, open: its session, its customers and its engine.

    Raises:
        QrloraError: the bundle, the packed file or the folder cannot be used.

    Attributes:
        places: where it came from.
        served: what fronts are given.
        packed: customers of the packed file.
    """

    def __init__(self, places: ModelPlaces, options: RunOptions) -> None:
        self.places = places
        bundle = open_bundle(places.bundle)
        self._session = _open_session(bundle, options)
        self.packed = 0
        self._store: CustomerStore | None = None
        if isinstance(self._session, SwitchableSession):
            self._load(self._session)
        elif places.customers or places.packed:
            raise InputError(f"{places.bundle} is a merged bundle: it holds one customer and takes no others")
        engine = LocalEngine(self._session, options.limits)
        self.served = ServedModel(places.name, bundle, engine, RowTokenizer(bundle))

    def _load(self, session: SwitchableSession) -> None:
        # The folder's files win over the packed ones.
        if self.places.packed:
            self.packed = load_packed(session, self.places.packed)
        if self.places.customers:
            self._store = CustomerStore(session, self.places.customers)

    def customer_folder(self) -> CustomerFolder | None:
        """The folder of customers, for who changes it; None: there is none."""
        if self._store is None or not isinstance(self._session, SwitchableSession):
            return None
        return CustomerFolder(self._store.folder, self._session.check)

    def follow(self) -> None:
        """Begin to follow the folder of customers."""
        if self._store is not None:
            self._store.start()

    def reload(self) -> None:
        """Load the packed file again; the folder is followed anyhow.

        Raises:
            InputError: it is damaged or of another bundle; what was loaded before stays.
        """
        if self.places.packed and isinstance(self._session, SwitchableSession):
            self.packed = load_packed(self._session, self.places.packed)

    def check_customers(self) -> tuple[int, list[str]]:
        """Read every file of the folder and load it once.

        Returns:
            How many there are, and what is wrong with those that cannot be served, one line each.
        """
        if self._store is None or not isinstance(self._session, SwitchableSession):
            return 0, []
        names, problems = sorted(customer_ids(self._store.folder)), []
        for name in names:
            try:
                self._session.load(name, read_customer(self._store.folder, name))
                self._session.unload(name)
            except QrloraError as error:
                problems.append(f"{name}: {error}")
        return len(names), problems

    def close(self) -> None:
        """Let go of the folder and end the engine."""
        if self._store is not None:
            self._store.close()
        self.served.engine.close()
        self.served.pool.shutdown(wait=False)


def _open_session(bundle: Bundle, options: RunOptions) -> SwitchableSession | MergedModel:
    if bundle.manifest.kind == "merged":
        return MergedModel(bundle, options.provider, options.threads, options.buckets)
    return SwitchableSession(
        bundle, options.provider, max_rows=options.max_rows, threads=options.threads, buckets=options.buckets
    )
