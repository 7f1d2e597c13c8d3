"""Swap a customer in a live process, and see which version every row of every request was answered by.

    python docs/live_swap.py
    python docs/live_swap.py --bundle BUNDLE --customers FOLDER [--customer acme --new acme-2.safetensors --other bolt]

Threads send requests whose rows belong to two customers and to the base. Meanwhile the file of one
customer is replaced by a new version, and that of the other one by a damaged file. A row is known
by its logits: before the requests begin, every version answers every text alone. Exit code 1 where
a row is the answer of no version, or a request saw two versions of one customer.

Without arguments a base, a bundle and two customers are made in a temporary folder. The output layer
of that base is trained for a moment on real text, the customers are made up: seeded random
coefficients, nothing that was learned. With --customers the files are copied first and never changed.
"""

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients, write_coefficients
from qrlora_deploy.formats.customer_files import customer_ids
from qrlora_deploy.runtime import Bundle, CustomerStore, Predictor, StoreEvent, SwitchableSession, open_bundle

TEXTS = (
    "what is my balance",
    "please move fifty dollars from checking to savings",
    "turn off the lights in the kitchen",
    "how long does it take to boil an egg",
    "book a table for two tonight",
    "what is the weather like in denver tomorrow",
)
BASE = "base"
DISTINCT = 20
"""A row belongs to a version that it is so many times nearer to than to any other one."""
DEADLINE_S = 30.0
"""Far more than a file takes to go live."""
AROUND = 3
"""Requests that are shown before and after a change."""


@dataclass(frozen=True)
class Version:
    """What a customer is for a while, and what it answers: logits `[labels]` for each of `TEXTS`."""

    owner: str
    name: str
    answers: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Request:
    """One call of `predict`: when it ran, and the version that each row was answered by; "?" is none."""

    begin_s: float
    end_s: float
    owners: tuple[str, ...]
    versions: tuple[str, ...]

    def seen(self, owner: str) -> set[str]:
        """Versions of one owner in this request."""
        return {version for name, version in zip(self.owners, self.versions, strict=True) if name == owner}

    def __str__(self) -> str:
        rows = [f"{owner} {version}".strip() for owner, version in zip(self.owners, self.versions, strict=True)]
        return f"{1e3 * (self.end_s - self.begin_s):5.1f} ms | {' | '.join(rows)}"


@dataclass
class Traffic:
    """Threads that ask until they are stopped, and what they were answered."""

    predictor: Predictor
    versions: Sequence[Version]
    rows: int
    start_s: float = field(default_factory=time.perf_counter)
    requests: list[Request] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def now(self) -> float:
        """Seconds since the traffic began."""
        return time.perf_counter() - self.start_s

    def note(self, event: str) -> float:
        """Put an event on the timeline; returns its time."""
        moment = self.now()
        self.events.append((moment, event))
        return moment

    def report(self, event: StoreEvent) -> None:
        """What the store calls."""
        self.note(f"the store: {event.kind} {event.customer}: {Path(event.message).name}")

    def ask(self, seed: int) -> None:
        """Send requests, one after the other: the work of one thread."""
        random = np.random.default_rng(seed)
        owners = sorted({version.owner for version in self.versions})
        try:
            while not self.stop.is_set():
                texts = random.integers(len(TEXTS), size=self.rows)
                chosen = tuple(owners[index] for index in random.integers(len(owners), size=self.rows))
                begin = self.now()
                answers = self.predictor.predict(
                    [TEXTS[text] for text in texts],
                    batch_size=self.rows,
                    customers=[None if owner == BASE else owner for owner in chosen],
                )
                end = self.now()
                logits = [np.array(answer.logits) for answer in answers]
                seen = tuple(map(self.version_of, chosen, texts, logits))
                self.requests.append(Request(begin, end, chosen, seen))
        except Exception as error:  # a thread that died silently would look like a success
            self.errors.append(f"{type(error).__name__}: {error}")

    def version_of(self, owner: str, text: int, logits: np.ndarray) -> str:
        """The one version of `owner` that these logits are clearly nearest to."""
        near: dict[bool, list[tuple[float, str]]] = {True: [], False: []}
        for version in self.versions:
            near[version.owner == owner].append((distance(logits, version.answers[text]), version.name))
        (best, name), *others = sorted(near[True])
        next_best = min((far for far, _ in [*others, *near[False]]), default=float("inf"))
        # Both may be infinite: then it is none.
        return name if best < next_best and DISTINCT * best <= next_best else "?"

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds.

        Raises:
            QrloraError: it does not come true, or a thread failed.
        """
        deadline = self.now() + DEADLINE_S
        while not condition():
            if self.errors or self.now() > deadline:
                raise QrloraError(f"{what} did not happen; {'; '.join(self.errors) or f'{DEADLINE_S:.0f} s went by'}")
            time.sleep(0.005)


def distance(left: np.ndarray, right: np.ndarray) -> float:
    """Greatest difference of two rows of logits; infinite with NaN or another number of labels."""
    if left.shape != right.shape or np.isnan(left).any() or np.isnan(right).any():
        return float("inf")
    return float(np.abs(left - right).max())


def answer_alone(bundle: Bundle, versions: Sequence[tuple[str, str, Coefficients | None]]) -> list[Version]:
    """Let every version answer every text on its own, in a session that serves nothing else.

    Raises:
        InputError: two versions answer a text alike, so that nothing could be told from answers.
    """
    session = SwitchableSession(bundle, threads=1)
    predictor = Predictor(session)
    answered = []
    for owner, name, coefficients in versions:
        if coefficients is not None:
            session.load(owner, coefficients)
        customer = None if coefficients is None else owner
        rows = [predictor.predict([text], customers=[customer])[0] for text in TEXTS]
        answered.append(Version(owner, name, tuple(np.array(row.logits) for row in rows)))
    for index, version in enumerate(answered):
        for other in answered[:index]:
            if min(map(distance, version.answers, other.answers)) < 1e-3:
                raise InputError(f"{version.owner} {version.name} and {other.owner} {other.name} answer alike")
    return answered


def run(bundle: Bundle, folder: Path, names: tuple[str, str], new: Coefficients, arguments: argparse.Namespace) -> int:
    """Send requests to the customers `names` of `folder` while their files change; returns the exit code."""
    customer, other = names
    first, second = (read_coefficients(folder / f"{name}.safetensors") for name in names)
    versions = answer_alone(
        bundle, [(customer, "v1", first), (customer, "v2", new), (other, "v1", second), (BASE, "", None)]
    )
    session = SwitchableSession(bundle, threads=1)
    traffic = Traffic(Predictor(session), versions, arguments.rows)
    threads = [threading.Thread(target=traffic.ask, args=(seed,)) for seed in range(arguments.threads)]
    with CustomerStore(session, folder, traffic.report):
        for thread in threads:
            thread.start()
        try:
            replaced = change_files(traffic, folder, names, new, arguments.seconds / 3)
        finally:
            traffic.stop.set()
            for thread in threads:
                thread.join()
    return show(traffic, customer, replaced)


def change_files(
    traffic: Traffic, folder: Path, names: tuple[str, str], new: Coefficients, pause_s: float
) -> tuple[float, ...]:
    """A new version of the first customer, then a damaged file of the second one; returns when."""
    customer, other = names
    traffic.note(f"requests begin: {customer}, {other} and the base in mixed batches")
    traffic.wait("an answer for everyone", lambda: {*names, BASE} <= {o for r in traffic.requests for o in r.owners})
    time.sleep(pause_s)
    replaced = traffic.note(f"{customer}.safetensors is replaced by version 2")
    write_coefficients(new, folder / f"{customer}.safetensors")
    traffic.wait("an answer of version 2", lambda: any("v2" in r.seen(customer) for r in traffic.requests[-50:]))
    time.sleep(pause_s)
    damaged_at = traffic.note(f"{other}.safetensors is replaced by a damaged file")
    damaged = folder / ".damaged"
    damaged.write_bytes((folder / f"{other}.safetensors").read_bytes()[:-7])
    damaged.replace(folder / f"{other}.safetensors")
    traffic.wait("the refusal", lambda: any(f"refused {other}" in event for _, event in list(traffic.events)))
    time.sleep(pause_s)
    traffic.note("requests end")
    return replaced, damaged_at


def show(traffic: Traffic, customer: str, changes: Sequence[float]) -> int:
    """Print the timeline and a summary; returns the exit code."""
    requests = sorted(traffic.requests, key=lambda request: request.end_s)
    new = [request for request in requests if "v2" in request.seen(customer)]
    moments = [(new[0].end_s if new else changes[0]), *changes[1:]]
    shown = {
        index
        for moment in moments
        for position in [sum(request.end_s < moment for request in requests)]
        for index in range(max(0, position - AROUND), min(len(requests), position + AROUND))
    }
    lines = [(request.end_s, f"request {index}: {request}") for index, request in enumerate(requests) if index in shown]
    print("timeline, in seconds; requests by when they were answered, those around each change:")
    for moment, line in sorted([*traffic.events, *lines]):
        print(f"{moment:8.3f}  {line}")
    rows = Counter(pair for request in requests for pair in zip(request.owners, request.versions, strict=True))
    unknown = sum(count for (_, version), count in rows.items() if version == "?")
    mixtures = sum(len(request.seen(owner)) > 1 for request in requests for owner in set(request.owners))
    stale = sum("v1" in request.seen(customer) and request.begin_s > new[0].end_s for request in requests if new)
    print("summary:")
    facts: dict[str, object] = {"requests": len(requests), "rows": sum(rows.values())}
    facts |= {f"rows of {owner} {version}".strip(): count for (owner, version), count in sorted(rows.items())}
    facts |= {"rows of no version": unknown, "requests that saw a mixture": mixtures}
    facts |= {"requests that began after a new answer and saw an old one": stale, "errors": len(traffic.errors)}
    if new:
        facts["from the file to the first new answer"] = f"{1e3 * (new[0].end_s - changes[0]):.0f} ms"
    for name, fact in facts.items():
        print(f"  {name}: {fact}")
    return 1 if unknown or mixtures or stale or traffic.errors else 0


def make_own(folder: Path) -> Bundle:
    """A base with an output layer, its basis, a switchable bundle and two made-up customers.

    Raises:
        InputError: the quickstart's model is not installed.
    """
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # Imported here: serving needs none of these.
    from exporters.onnx import export_switchable
    from exporters.onnx.options import OnnxOptions
    from qrlora_deploy.data.examples import Examples
    from qrlora_deploy.data.sample import general_examples
    from qrlora_deploy.exporting.job import ExportJob
    from qrlora_deploy.factorization.from_checkpoint import factorize
    from qrlora_deploy.models.checkpoint import open_checkpoint
    from qrlora_deploy.models.targets import choose_targets
    from qrlora_deploy.quickstart.run import find_encoder
    from qrlora_deploy.rank_rules.energy_share import EnergyShare
    from qrlora_deploy.training.settings import WarmupSettings
    from qrlora_deploy.training.warmup import warmup

    encoder = find_encoder()
    print("training an output layer for a moment, exporting, making two customers up ...", flush=True)
    everything = general_examples()
    # Rows of one label stand together: this is a fifth of each.
    few = Examples(everything.texts[::5], None, everything.labels[::5], everything.name)
    warmup(encoder, few, None, folder / "base", WarmupSettings(mode="head", epochs=1, max_length=32, device="cpu"))
    base = open_checkpoint(str(folder / "base"))
    basis = factorize(base, choose_targets(base.skeleton(), ("query", "value"), 3), EnergyShare(0.5))
    export_switchable(
        ExportJob(base, basis, folder / "bundle"),
        OnnxOptions(data=Examples(list(TEXTS), None, few.labels[: len(TEXTS)], "texts")),
    )
    (folder / "customers").mkdir()
    for seed, name in enumerate(("acme", "bolt")):
        random = np.random.default_rng(seed)
        values = random.choice([-1.0, 1.0], basis.total_rank) * random.uniform(0.2, 0.6, basis.total_rank)
        customer = Coefficients(values.astype(np.float32), basis.digest, base.name, base.digest, base.task, base.labels)
        write_coefficients(customer, folder / "customers" / f"{name}.safetensors")
    return open_bundle(folder / "bundle")


def choose(arguments: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """The customer that is swapped and the other one, both with a file in `folder`.

    Raises:
        InputError: there are not two.
    """
    there = sorted(customer_ids(folder))
    customer = arguments.customer or next((name for name in there if name != arguments.other), None)
    other = arguments.other or next((name for name in there if name != customer), None)
    missing = [name for name in (customer, other) if name not in there]
    if missing or customer is None or other is None or customer == other:
        raise InputError(f"{arguments.customers or folder} must hold the files of two customers, not of {there[:5]}")
    return customer, other


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--bundle", type=Path, help="a switchable bundle; one is made without it")
    parser.add_argument("--customers", type=Path, help="its customers, NAME.safetensors; copied, not changed")
    parser.add_argument("--customer", help="the customer that gets a new version; the first one of the folder")
    parser.add_argument("--new", type=Path, help="its new version; without it, version 1 with all signs turned")
    parser.add_argument("--other", help="the customer that gets a damaged file; the next one of the folder")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long the requests go on (default 6)")
    parser.add_argument("--threads", type=int, default=3, help="threads that send requests (default 3)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a request (default 8)")
    arguments = parser.parse_args()
    if (arguments.bundle is None) != (arguments.customers is None):
        parser.error("--bundle and --customers belong together")
    if arguments.bundle is None and (arguments.customer or arguments.new or arguments.other):
        parser.error("--customer, --new and --other need --bundle and --customers")
    if min(arguments.threads, arguments.rows) < 1 or arguments.seconds <= 0:
        parser.error("--seconds, --threads and --rows must be positive")
    return arguments


def main() -> int:
    """Prepare, then run; an error is one line."""
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="qrlora-live-swap-") as temporary:
        place = Path(temporary)
        try:
            if arguments.bundle is None:
                bundle = make_own(place)
            else:
                bundle = open_bundle(arguments.bundle)
                (place / "customers").mkdir()
                for name in choose(arguments, arguments.customers):
                    shutil.copy(arguments.customers / f"{name}.safetensors", place / "customers")
            customers = place / "customers"
            names = choose(arguments, customers)
            if arguments.new is not None:
                new = read_coefficients(arguments.new)
            else:
                old = read_coefficients(customers / f"{names[0]}.safetensors")
                new = replace(old, values=-old.values)
            return run(bundle, customers, names, new, arguments)
        except QrloraError as error:
            print(f"Error: {error}", file=sys.stderr)
            return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
