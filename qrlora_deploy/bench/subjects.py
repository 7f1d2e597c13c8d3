"""What can be measured: a bundle, merged or switchable, and its peers in PyTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from qrlora_deploy.bench.report_parts import Kind
from qrlora_deploy.bench.report_parts import Subject as SubjectRecord
from qrlora_deploy.bench.workload import LENGTHS, Workload, token_inputs
from qrlora_deploy.errors import InputError, ProviderError, argument
from qrlora_deploy.formats.coefficients import SUFFIX, Coefficients
from qrlora_deploy.formats.customer_files import customer_ids, read_customer
from qrlora_deploy.io.files import digest_file
from qrlora_deploy.runtime.bundle.bundle import MANIFEST_FILE, Bundle, open_bundle
from qrlora_deploy.runtime.prediction.tokenizing import TextEncoder, batches
from qrlora_deploy.runtime.sessions.buckets import Buckets
from qrlora_deploy.runtime.sessions.runners import make_runner, open_graph
from qrlora_deploy.runtime.sessions.session import PROVIDERS
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.tasks.registry import task_named
from qrlora_deploy.tokenization.words import LocatedWords, Place

Call = Callable[[int], Any]
"""Answers the batch of a turn, and returns when the logits are in the host's memory."""

Mix = Literal["different", "one", "base"]

ANSWER_BATCH = 32


@dataclass(frozen=True)
class Spec:
    """Which subject and how it is opened; it can be sent to another process.

    Attributes:
        name: unique in a report.
        role: as in the report.
        kind: "bundle", or a peer.
        path: the bundle's folder, or that of the peer's base.
        provider: "cpu", "cuda" or "tensorrt".
        threads: within an operator; None leaves the choice to the library.
        cuda_graph: run captured graphs of the benchmark's shapes.
        folder: customers' files for a switchable bundle.
        customers: those that are loaded; None: all.
        mix: whose the rows of a batch are: different customers', one customer's, or the base's.
        targets: layers that the peer with PEFT adapts.
        precision: of a peer: "fp32", "fp16" or "bf16".
        new_tokens: of a decoder's answers.
    """

    name: str
    role: Literal["candidate", "reference", "peer"]
    kind: Literal["bundle", "torch-eager", "torch-compile", "peft"]
    path: Path
    provider: str = "cpu"
    threads: int | None = None
    cuda_graph: bool = False
    folder: Path | None = None
    customers: tuple[str, ...] | None = None
    mix: Mix = "different"
    targets: tuple[str, ...] = ()
    precision: str = "fp32"
    new_tokens: int = 1


class Subject(Protocol):
    """An open subject."""

    record: SubjectRecord

    def prepare(self, workload: Workload) -> Call:
        """Make the inputs of a workload; only the answering itself is left to the call."""


class OpenBundle:
    """What all bundles have: whose their rows are.

    Attributes:
        record: for the report.
        customers: those that were loaded, in order. refused: why others were not.
    """

    record: SubjectRecord

    def __init__(self, spec: Spec, bundle: Bundle) -> None:
        self.spec = spec
        self.bundle = bundle
        self.customers: list[str] = []
        self.refused: dict[str, str] = {}

    def owners(self, batch: int) -> list[str | None]:
        """Whose each row of a batch is."""
        if self.spec.mix == "base" or not self.customers:
            return [None] * batch
        if self.spec.mix == "one":
            return [self.customers[0]] * batch
        return [self.customers[row % len(self.customers)] for row in range(batch)]

    def load_customers(self, load: Callable[[str, Coefficients], None]) -> None:
        """Give `load` every customer of the spec."""
        folder = self.spec.folder
        if folder is None:
            return
        for name in sorted(customer_ids(folder)) if self.spec.customers is None else self.spec.customers:
            try:
                load(name, read_customer(folder, name))
                self.customers.append(name)
            except InputError as error:
                self.refused[name] = str(error)


class BundleSubject(OpenBundle):
    """A bundle in ONNX Runtime. Tokenizing is done in `prepare`, so it is in no latency.

    Attributes:
        switchable: the session of a switchable bundle; None for a merged one.

    Raises:
        InputError, FileFormatError, ProviderError: the bundle cannot be opened that way.
    """

    def __init__(self, spec: Spec, workloads: Sequence[Workload], bundle: Bundle | None = None) -> None:
        super().__init__(spec, bundle or open_bundle(spec.path))
        self.switchable: SwitchableSession | None = None
        check_workloads(self.bundle, workloads)
        buckets = _buckets(spec, self.bundle, workloads)
        if self.bundle.manifest.kind == "merged":
            session = open_graph(self.bundle, spec.provider, spec.threads, spec.cuda_graph)
            self._runner = make_runner(session, self.bundle, spec.provider, buckets, threads=spec.threads)
        else:
            self.switchable = SwitchableSession(
                self.bundle, spec.provider, rows=self._rows(), threads=spec.threads, buckets=buckets
            )
            session = self.switchable.session
            self.load_customers(self.switchable.load)
        self._encoder = TextEncoder(self.bundle)
        active = session.get_providers()[0]
        if active != PROVIDERS[spec.provider]:
            raise ProviderError(f"{spec.path}: {PROVIDERS[spec.provider]} was asked for, but {active} is active")
        self.record = describe_bundle(spec, self.bundle, active)

    def prepare(self, workload: Workload) -> Call:
        """As `Subject.prepare`."""
        owners = self.owners(workload.batch)
        inputs = self._inputs(workload)
        if self.switchable is None:
            return lambda turn: self._runner.run(inputs[turn % len(inputs)])
        session = self.switchable
        return lambda turn: session.predict(inputs[turn % len(inputs)], owners)

    def answer(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        customer: str | None,
        places: Sequence[Sequence[Place]] | None = None,
    ) -> list[tuple[str, ...]]:
        """The labels of every text, as of `Answer`, for a customer or, where that is None, the base.

        Args:
            texts: all of them.
            pairs: their second texts, or None.
            customer: whose.
            places: of the words of each text, where words are tagged; what looks like words if None.
        """
        task = task_named(self.bundle.manifest.task)
        found: dict[int, tuple[str, ...]] = {}
        for rows in batches(texts, pairs, ANSWER_BATCH):
            firsts = [texts[row] for row in rows]
            words: Sequence[LocatedWords | None] = [None] * len(rows)
            if task.answers_words:
                own = None if places is None else [places[row] for row in rows]
                inputs, words = self._encoder.encode_words(firsts, words=own)
            else:
                inputs = self._encoder.encode(firsts, [pairs[row] for row in rows] if pairs else None)
            if self.switchable is None:
                logits, answering = self._runner.run(inputs), [self.bundle.manifest.answering] * len(rows)
            else:
                logits, answering = self.switchable.run(inputs, [customer] * len(rows))
            found.update(
                (row, one.answer(task, values, own_words).labels)
                for row, values, one, own_words in zip(rows, logits, answering, words, strict=True)
            )
        return [found[row] for row in range(len(texts))]

    def _rows(self) -> int:
        count = 0 if self.spec.folder is None else sum(1 for _ in customer_ids(self.spec.folder))
        # Swaps write a free row first, and a table that grows would be captured anew.
        return max(64, count + 16)

    def _inputs(self, workload: Workload) -> list[dict[str, np.ndarray]]:
        if workload.length is None:
            seconds = workload.pairs or [None] * len(workload.texts)
            return [self._encoder.encode(texts, pair) for texts, pair in zip(workload.texts, seconds, strict=True)]
        return [
            token_inputs(workload, self._encoder.names, self._encoder.vocabulary, self.bundle.manifest.pad_token_id)
        ]


def customer_file(spec: Spec, customer: str) -> Path:
    """The file of a customer.

    Raises:
        InputError: the subject has no folder of customers.
    """
    if spec.folder is None:
        raise InputError(f"{spec.path} was opened without customers")
    return spec.folder / f"{customer}{SUFFIX}"


def with_graphs(spec: Spec) -> Spec:
    """The same subject with captured CUDA graphs."""
    return replace(spec, name=f"{spec.name} (CUDA graph)", cuda_graph=True)


def check_workloads(bundle: Bundle, workloads: Sequence[Workload]) -> None:
    """Make sure that a bundle can take every shape.

    Raises:
        InputError: a length is more than the model's.
    """
    most = bundle.manifest.max_length
    long = sorted({workload.length for workload in workloads if workload.length and workload.length > most})
    if long:
        raise InputError(f"{argument('lengths', long)}: {bundle.folder} takes at most {most} tokens")


def _buckets(spec: Spec, bundle: Bundle, workloads: Sequence[Workload]) -> Buckets | None:
    """The shapes of captured graphs: those of the benchmark, and steps of length for texts."""
    if not spec.cuda_graph or not workloads:
        return None
    if spec.provider != "cuda":
        raise InputError(f"{argument('cuda_graph')} needs {argument('provider', 'cuda')}, not {spec.provider}")
    most = bundle.manifest.max_length
    fixed = {workload.length for workload in workloads if workload.length}
    steps = {min(length, most) for length in LENGTHS} if any(w.length is None for w in workloads) else set()
    return Buckets(tuple({workload.batch for workload in workloads}), tuple(fixed | steps))


def describe_bundle(spec: Spec, bundle: Bundle, active: str) -> SubjectRecord:
    """What the report says of an open bundle.

    Args:
        active: the provider that runs it.
    """
    options = {"threads": str(spec.threads or "default")}
    if spec.provider == "cuda":
        options["cuda_graph"] = "on" if spec.cuda_graph else "off"
    kind: Kind = "merged" if bundle.manifest.kind == "merged" else "switchable"
    if kind == "switchable":
        options["mix"] = spec.mix if spec.folder is not None else "base"
    return SubjectRecord(
        name=spec.name,
        role=spec.role,
        kind=kind,
        path=str(spec.path),
        digest=digest_file(bundle.folder / MANIFEST_FILE),
        precision=bundle.manifest.precision,
        provider=active,
        options=options,
        size_bytes=folder_bytes(bundle.folder),
    )


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def largest(workloads: Sequence[Workload]) -> Workload:
    """The workload with most tokens; texts count as long ones."""
    return max(workloads, key=lambda workload: workload.batch * (workload.length or max(LENGTHS)))
