"""Predictions under fire: threads answer mixed batches while others swap the customers' versions.

    python -m tests.runtime.fire --seconds 60 --bundle PATH

Every customer has a few versions, whose answers are computed alone before the fire opens. Under
fire every row must be the answer of exactly one version of its own customer, with that version's
labels. Half an old and half a new version, or a neighbour's numbers, would be none of them.
"""

import argparse
import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime import Buckets, Manifest, SwitchableSession, open_bundle

MARGIN = 1e-3
"""How much nearer a row must be to its version than versions are to each other, where the size of
the batch changes the last bits. Where it does not, rows must be equal bit for bit."""

BATCHES = (1, 2, 3, 5, 8, 13, 16)
BREAK_SECONDS = 0.005
"""The customer that comes and goes is away, and there, for so long."""

ReadMemory = Callable[[], int | None]


@dataclass(frozen=True)
class Scene:
    """The customers, their versions, and what each answers.

    Attributes:
        inputs: one encoded text per row, all of one length.
        versions: versions of each customer; the base, None, has no coefficients.
        answers: per customer `[versions, texts, outputs]`.
        labels: per customer and version.
        visitor: the customer that is loaded and unloaded all the time.
    """

    inputs: dict[str, np.ndarray]
    versions: dict[str, list[Coefficients]]
    answers: dict[str | None, np.ndarray]
    labels: dict[str | None, list[tuple[str, ...]]]
    visitor: str


@dataclass
class Report:
    """What the fire left.

    Attributes:
        rows: answers that were compared.
        swaps: versions that were published.
        absences: batches that were refused because the visitor was away.
        seen: versions that at least one answer came from, of all that there are.
        distance: the least difference between two versions of a customer on a text.
        bound: the greatest difference between a row and its version that passes; 0: bit for bit.
        wrong: the first rows that were no version's answer, in words.
        wrong_count: how many there were, with those whose numbers are right and whose labels are not.
        mixtures: how many of them had numbers of no version.
        errors: tracebacks of threads.
        growth_bytes: resident memory at the end less that after a third of the time; None where
            the system does not tell.
    """

    seconds: float = 0.0
    rows: int = 0
    swaps: int = 0
    absences: int = 0
    seen: int = 0
    versions: int = 0
    distance: float = 0.0
    bound: float = 0.0
    wrong: list[str] = field(default_factory=list)
    wrong_count: int = 0
    mixtures: int = 0
    errors: list[str] = field(default_factory=list)
    growth_bytes: int | None = None

    def __str__(self) -> str:
        growth = "not known" if self.growth_bytes is None else f"{self.growth_bytes / 2**20:+.1f} MiB"
        lines = [
            f"{self.rows} rows checked, {self.wrong_count} wrong, {self.mixtures} of them mixtures",
            f"{len(self.errors)} threads failed",
            f"{self.rows / self.seconds:.0f} rows/s and {self.swaps / self.seconds:.0f} swaps/s, {self.swaps} swaps",
            f"{self.seen} of {self.versions} versions seen, visitor away in {self.absences} batches",
            f"versions differ by {self.distance:.2e} or more, rows may by {self.bound:.2e}",
            f"resident memory {growth} after the first third",
        ]
        return "\n".join([*lines, *self.wrong, *self.errors])


def made_up_customer(manifest: Manifest, seed: int, own_labels: int | None = None) -> Coefficients:
    """A customer of a bundle, all coefficients far from zero; with `own_labels` it has a head of its own."""
    random = np.random.default_rng(seed)
    signs = random.choice([-1.0, 1.0], manifest.total_rank)
    head = {}
    if own_labels is not None:
        shape = (own_labels, manifest.head_features)
        head = {
            "classifier.weight": random.normal(0.0, 0.3, shape).astype(np.float32),
            "classifier.bias": random.normal(size=own_labels).astype(np.float32),
        }
    return Coefficients(
        values=(signs * random.uniform(0.5, 1.5, manifest.total_rank)).astype(np.float32),
        basis_digest=manifest.basis_digest,
        base_name=manifest.base_name,
        base_digest=manifest.base_digest,
        task=manifest.task,
        labels=manifest.labels if own_labels is None else tuple(f"{seed}-{label}" for label in range(own_labels)),
        head=head,
    )


def made_up_inputs(manifest: Manifest, texts: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Texts `[texts, length]` of small token numbers, without padding."""
    random = np.random.default_rng(seed)
    fixed = {"attention_mask": 1, "token_type_ids": 0}
    names = [record.name for record in manifest.inputs if record.shape == ("batch", "sequence")]
    inputs = {name: np.full((texts, length), fixed.get(name, 0), dtype=np.int64) for name in names}
    inputs["input_ids"] = random.integers(5, 100, (texts, length))
    return inputs


def set_scene(session: SwitchableSession, customers: int = 12, versions: int = 4, texts: int = 3) -> Scene:
    """Make customers up and let `session` answer alone, row by row, for every version of each."""
    manifest = session.manifest
    random = np.random.default_rng(1)
    inputs = made_up_inputs(manifest, texts, length=min(12, manifest.max_length))
    made: dict[str, list[Coefficients]] = {}
    for number in range(customers):
        # Every other customer has heads of its own, now with more and now with fewer labels.
        own = [int(random.integers(2, manifest.head_labels + 1)) for _ in range(versions)]
        heads = own if manifest.head_labels and number % 2 else [None] * versions
        seeds = range(versions * number, versions * (number + 1))
        made[f"c{number}"] = [
            made_up_customer(manifest, seed, labels) for seed, labels in zip(seeds, heads, strict=True)
        ]
    answers: dict[str | None, np.ndarray] = {}
    labels: dict[str | None, list[tuple[str, ...]]] = {}
    answers[None], labels[None] = _alone(session, inputs, None, [None])
    for name, coefficients in made.items():
        answers[name], labels[name] = _alone(session, inputs, name, list(coefficients))
    return Scene(inputs, made, answers, labels, visitor=f"c{customers - 1}")


def _alone(
    session: SwitchableSession, inputs: dict[str, np.ndarray], name: str | None, versions: list[Coefficients | None]
) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    answers, labels = [], []
    for version in versions:
        if name is not None and version is not None:
            session.load(name, version)
        rows = [
            session.predict(_pick(inputs, np.array([text])), [name]) for text in range(len(next(iter(inputs.values()))))
        ]
        answers.append(np.concatenate([logits for logits, _ in rows]))
        labels.append(rows[0][1][0])
    return np.stack(answers), labels


def _pick(inputs: dict[str, np.ndarray], texts: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[texts] for name, values in inputs.items()}


def difference(left: np.ndarray, right: np.ndarray) -> float:
    """The greatest difference of two rows of logits; infinite where they mask different labels."""
    finite = np.isfinite(left)
    if (finite != np.isfinite(right)).any() or np.isnan(left).any() or np.isnan(right).any():
        return float("inf")
    return float(np.abs(left[finite] - right[finite]).max(initial=0.0))


def measure_distance(scene: Scene) -> float:
    """The least difference between two versions of one customer, or of a version and the base."""
    pairs = []
    for name in scene.versions:
        several = [*scene.answers[name], scene.answers[None][0]]
        pairs += [(a, b) for left, right in combinations(several, 2) for a, b in zip(left, right, strict=True)]
    return min(difference(left, right) for left, right in pairs)


def measure_spread(session: SwitchableSession, scene: Scene, rounds: int = 20) -> float:
    """The greatest difference between a row of a batch and the same row alone, while nothing is swapped."""
    random = np.random.default_rng(2)
    names: list[str | None] = [None, *scene.versions]
    greatest = 0.0
    for size in BATCHES * rounds:
        chosen, texts = random.integers(len(names), size=size), random.integers(_texts(scene), size=size)
        logits, _ = session.predict(_pick(scene.inputs, texts), [names[index] for index in chosen])
        for row, index, text in zip(logits, chosen, texts, strict=True):
            # The version that was loaded last.
            greatest = max(greatest, difference(row, scene.answers[names[index]][-1, text]))
    return greatest


def _texts(scene: Scene) -> int:
    return len(next(iter(scene.inputs.values())))


def resident_bytes() -> int | None:
    """Resident memory of this process; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)


class Fire:
    """The threads and what they find."""

    def __init__(self, session: SwitchableSession, scene: Scene, bound: float) -> None:
        self.session, self.scene, self.bound = session, scene, bound
        self.stop = threading.Event()
        self.report = Report(bound=bound)
        self.seen: set[tuple[str | None, int]] = set()
        self._lock = threading.Lock()

    def watch(self, work: Callable[[int], None], seed: int) -> threading.Thread:
        """A thread that does `work` again and again until the fire stops or something raises."""

        def body() -> None:
            try:
                work(seed)
            except BaseException:
                with self._lock:
                    self.report.errors.append(traceback.format_exc())
                self.stop.set()

        return threading.Thread(target=body, daemon=True)

    def read(self, seed: int) -> None:
        """Answer batches of random customers and compare every row."""
        random = np.random.default_rng(seed)
        names: list[str | None] = [None, *self.scene.versions]
        rows = absences = 0
        seen: set[tuple[str | None, int]] = set()
        while not self.stop.is_set():
            size = int(random.choice(BATCHES))
            customers = [names[index] for index in random.integers(len(names), size=size)]
            texts = random.integers(_texts(self.scene), size=size)
            try:
                logits, labels = self.session.predict(_pick(self.scene.inputs, texts), customers)
            except InputError:
                if self.scene.visitor not in customers:
                    raise
                absences += 1
                continue
            found = {}
            for row, its_labels, customer, text in zip(logits, labels, customers, texts, strict=True):
                version = self._check(row, its_labels, customer, int(text))
                if version is not None and found.setdefault(customer, version) != version:
                    self._complain(f"{customer} has two versions in one batch: {found[customer]} and {version}")
                seen.add((customer, -1 if version is None else version))
            rows += size
        with self._lock:
            self.report.rows += rows
            self.report.absences += absences
            self.seen |= {(customer, version) for customer, version in seen if version >= 0}

    def _check(self, row: np.ndarray, labels: tuple[str, ...], customer: str | None, text: int) -> int | None:
        answers = self.scene.answers[customer][:, text]
        if self.bound == 0.0:
            fits = [int(index) for index in np.flatnonzero((answers == row).all(axis=1))]
        else:
            fits = [index for index, answer in enumerate(answers) if difference(row, answer) <= self.bound]
        if len(fits) != 1:
            nearest = min(difference(row, answer) for answer in answers)
            self._complain(f"a row of {customer} fits {len(fits)} versions, the nearest at {nearest:.2e}: {row}", 1)
            return None
        if labels != self.scene.labels[customer][fits[0]]:
            self._complain(f"a row of {customer} is version {fits[0]} with the labels {labels}")
        return fits[0]

    def _complain(self, text: str, mixtures: int = 0) -> None:
        with self._lock:
            self.report.wrong_count += 1
            self.report.mixtures += mixtures
            if len(self.report.wrong) < 10:
                self.report.wrong.append(text)

    def write(self, seed: int) -> None:
        """Swap versions of the customers that are always there, as fast as it goes."""
        random = np.random.default_rng(seed)
        names = [name for name in self.scene.versions if name != self.scene.visitor]
        swaps = 0
        while not self.stop.is_set():
            name = names[random.integers(len(names))]
            versions = self.scene.versions[name]
            self.session.load(name, versions[random.integers(len(versions))])
            swaps += 1
        with self._lock:
            self.report.swaps += swaps

    def come_and_go(self, seed: int) -> None:
        """Load and unload the visitor."""
        random = np.random.default_rng(seed)
        versions = self.scene.versions[self.scene.visitor]
        while not self.stop.is_set():
            self.session.unload(self.scene.visitor)
            self.stop.wait(BREAK_SECONDS)
            self.session.load(self.scene.visitor, versions[random.integers(len(versions))])
            self.stop.wait(BREAK_SECONDS)


def fire(
    folder: Path,
    seconds: float,
    readers: int = 8,
    writers: int = 2,
    provider: str = "cpu",
    buckets: Buckets | None = None,
    sabotage: Callable[[SwitchableSession], None] | None = None,
    merged_cache_bytes: int = 0,
    read_memory: ReadMemory = resident_bytes,
) -> Report:
    """Open a switchable bundle, set the scene, and let the threads loose.

    Args:
        folder: the bundle.
        seconds: for how long.
        readers: threads that predict.
        writers: threads that swap; one more loads and unloads a customer.
        provider: "cpu" or "cuda".
        buckets: of the session.
        sabotage: breaks the session after the scene is set, to prove that this notices. The fire
            then stops at the first mixture.
        merged_cache_bytes: of the session.
        read_memory: resident bytes of the process.

    Raises:
        AssertionError: versions of this bundle lie too near to each other to be told apart.
    """
    session = SwitchableSession(
        open_bundle(folder), provider, rows=4, threads=1, buckets=buckets, merged_cache_bytes=merged_cache_bytes
    )
    scene = set_scene(session)
    distance, spread = measure_distance(scene), measure_spread(session, scene)
    # A GPU that runs several batches at once chooses other sums than for one alone.
    bound = 0.0 if spread == 0.0 and provider == "cpu" else MARGIN * distance
    assert distance > 1e-2 and 2 * spread <= MARGIN * distance, f"versions differ by {distance}, batches by {spread}"
    if sabotage is not None:
        sabotage(session)
    burning = Fire(session, scene, bound)
    report = burning.report
    report.distance, report.versions = distance, 1 + sum(map(len, scene.versions.values()))
    threads = [burning.watch(burning.read, 100 + number) for number in range(readers)]
    threads += [burning.watch(burning.write, 200 + number) for number in range(writers)]
    threads.append(burning.watch(burning.come_and_go, 300))
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    first = None
    while (passed := time.monotonic() - begin) < seconds and not burning.stop.is_set():
        if first is None and passed > seconds / 3:
            gc.collect()
            first = read_memory()
        if sabotage is not None and report.mixtures:
            break
        burning.stop.wait(0.05)
    last = read_memory()
    burning.stop.set()
    for thread in threads:
        thread.join(timeout=60)
        if thread.is_alive():
            report.errors.append("a thread did not end")
    report.seconds = time.monotonic() - begin
    report.seen = len(burning.seen)
    report.growth_bytes = None if first is None or last is None else last - first
    return report


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Swap customers under fire and check every answer.")
    parser.add_argument("--bundle", type=Path, required=True, help="a switchable bundle")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--buckets", action="store_true", help="run in buckets, on CUDA as captured graphs")
    options = parser.parse_args()
    buckets = Buckets((1, 4, 16), (12,)) if options.buckets else None
    report = fire(options.bundle, options.seconds, options.readers, options.writers, options.provider, buckets)
    print(report)
    return 1 if report.wrong_count or report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
