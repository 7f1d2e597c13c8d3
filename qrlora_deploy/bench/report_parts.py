"""The parts of a benchmark's report: what was measured, where, how, and what was made of it.

`docs/bench.md` describes the fields. All times are milliseconds, all sizes bytes, all rates per second.
"""

from typing import Literal

from qrlora_deploy.io.strict import Record

Scenario = Literal["single-stream", "offline", "generation", "server", "idle-gap", "cold-start", "swap"]
SCENARIOS: tuple[Scenario, ...] = ("single-stream", "offline", "server", "idle-gap", "cold-start", "swap")
"""Of what answers texts as a whole."""

DECODER_SCENARIOS: tuple[Scenario, ...] = ("generation", "server", "cold-start")
"""Of decoders."""

Unit = Literal["ms", "rows/s", "tokens/s", "requests/s"]

TTFT, TPOT, ITL, TOKENS, GOODPUT = "ttft", "tpot", "itl", "tokens", "goodput"
"""Variants of the scenario generation: time to first token, time per output token behind it (an answer's mean), each
time between two tokens, tokens a second, and answers a second that are within both budgets."""

Kind = Literal["merged", "switchable", "torch-eager", "torch-compile", "peft"]


def shape_name(batch: int, length: int | None) -> str:
    """Such as `8x64`, or `8xtexts` for texts of the user in their own lengths."""
    return f"{batch}x{length or 'texts'}"


class Interval(Record):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


class Memory(Record):
    """Of a process that only opens the subject and runs its largest shape.

    Attributes:
        host_peak_bytes: largest resident set.
        host_before_bytes: before the subject was opened,
            with the libraries loaded.
        device_bytes: memory of the GPU that is in use more than before, at the end; None without one.
    """

    host_peak_bytes: int
    host_before_bytes: int
    device_bytes: int | None = None


class Parity(Record):
    """`runtime.verify` on the benchmark's provider; see `ParityReport`."""

    max_abs_error: float | None
    bound: float
    label_agreement: float
    effect_correlation: float | None = None
    passed: bool


class Subject(Record):
    """What was measured.

    Attributes:
        name: unique in the report.
        role: "candidate", "reference", or "peer", which is never judged.
        digest: SHA-256 of the manifest, which seals every other file; of a peer its weights'.
        provider: the execution provider that is first in the open session; of a peer its device.
        options: what else decides its speed, such as CUDA graphs or threads.
    """

    name: str
    role: Literal["candidate", "reference", "peer"]
    kind: Kind
    path: str
    digest: str
    precision: str
    provider: str
    options: dict[str, str] = {}
    size_bytes: int
    memory: Memory | None = None
    parity: Parity | None = None


class Customer(Record):
    """A file of the folder of customers; `refused` says why it cannot be served, where it cannot."""

    name: str
    size_bytes: int
    digest: str = ""
    refused: str = ""


class Measurement(Record):
    """One subject in one scenario and shape.

    Attributes:
        subject: name.
        scenario: see `docs/bench.md`.
        batch: rows of a run.
        length: tokens of a row; None where they are texts of the user.
        variant: what else tells measurements of a scenario apart, such as a rate, "with swaps", or of a decoder "ttft".
        unit: of `samples` and all that is made from them: "ms"; "rows/s" in the scenario offline; "tokens/s" and
            "requests/s" in the scenario generation.
        samples: in the order in which they were taken, all of them.
        warmup: before them, not part of any figure.
        percentiles: by name; `refused`: of those that are missing, how many samples they need.
        windows: median of each window.
        spread: of the last three; None where there are fewer.
        stable: whether those agree; None where a scenario has no windows.
        throughput_per_s: rows answered by the time spent in runs.
        offered_per_s: in the scenario server: arrivals.
        saturated: the queue grew until it was cut off.
        goodput_per_s: of a decoder in the scenario server: answers within both budgets.
    """

    subject: str
    scenario: Scenario
    batch: int
    length: int | None
    variant: str = ""
    unit: Unit = "ms"
    samples: list[float]
    warmup: list[float] = []
    percentiles: dict[str, Interval] = {}
    refused: dict[str, int] = {}
    windows: list[float] = []
    spread: float | None = None
    stable: bool | None = None
    throughput_per_s: float | None = None
    offered_per_s: float | None = None
    saturated: bool = False
    goodput_per_s: float | None = None

    @property
    def shape(self) -> str:
        """As `shape_name`."""
        return shape_name(self.batch, self.length)

    @property
    def key(self) -> tuple[str, int, int | None, str]:
        """The same for what may be compared: all but the subject."""
        return self.scenario, self.batch, self.length, self.variant


class Capacity(Record):
    """The scenario server's answer: the largest rate that was tried with its p99 within the budget.

    Attributes:
        budget_ms: of a request; of a decoder's time to first token.
        tpot_ms: of a decoder's time per output token, which 99 % of the answers keep together with the other.
        rate_per_s: None where no rate that was tried stayed within it.
        bounded: a higher rate failed, so this is the limit and not the end of the search.
        refused: requests that a p99 needs, where a run had time for fewer; then no rate was judged.
    """

    subject: str
    batch: int
    length: int | None
    budget_ms: float
    rate_per_s: float | None
    bounded: bool
    refused: int = 0
    tpot_ms: float | None = None


class Comparison(Record):
    """`statistic` of a subject by that of the baseline in the same measurement: below 1 is less.

    A paired p50 is the median of the ratios within the rounds, which may differ a little from the
    ratio of the two medians.

    Attributes:
        baseline: the other subject; "earlier report" where it is not of this run.
        paired: measured in turn, in the same rounds.
        difference: "none" where the interval reaches into 1 ± `measurements.SAME_WITHIN`.
        caveat: why the two are not to be compared, such as another machine; empty where they are.
    """

    subject: str
    baseline: str
    scenario: Scenario
    batch: int
    length: int | None
    variant: str = ""
    statistic: str
    ratio: Interval
    paired: bool = True
    difference: Literal["less", "more", "none"]
    caveat: str = ""


class Accuracy(Record):
    """A customer's own file: right answers of the subject and of its base (slot 0).

    A decoder's answer is right where greedy writing gives it to the last token.

    Attributes:
        base_accuracy: None where the bundle holds no base, or the base has other labels.
        reference_accuracy: of the reference or the earlier report on as many rows; None without one.
        nll: of a decoder, the mean negative log likelihood of an answer's token; the other two likewise.
        error: why it could not be measured; then there are no figures.
    """

    subject: str
    customer: str
    data: str
    rows: int = 0
    accuracy: float | None = None
    base_accuracy: float | None = None
    reference_accuracy: float | None = None
    nll: float | None = None
    base_nll: float | None = None
    reference_nll: float | None = None
    error: str = ""


class Verdict(Record):
    """What became of one rule for one subject.

    Attributes:
        rule: its name in the gate file. subject, customer: empty where it is not about one.
        outcome: "passed"; "failed"; or "unknown": it could not be decided, which fails as well.
        line: one line that says it.
    """

    rule: str
    subject: str = ""
    customer: str = ""
    measured: float | None = None
    limit: float | None = None
    interval: Interval | None = None
    outcome: Literal["passed", "failed", "unknown"]
    line: str


class Gate(Record):
    """All verdicts. `customers`: whether each customer's file passed; `passed`: the rollout as a whole."""

    file: str
    verdicts: list[Verdict]
    customers: dict[str, bool]
    passed: bool


class Environment(Record):
    """Where and when; what is not known is None or absent."""

    date: str
    host: dict[str, str | int | float | None]
    gpus: list[dict[str, str]] = []
    versions: dict[str, str]
    tf32: bool = False
    load_average: float | None = None


class Settings(Record):
    """How it was measured, enough to repeat it; see `bench.settings.BenchSettings`."""

    scenarios: list[Scenario]
    provider: str
    threads: int | None
    batches: list[int]
    lengths: list[int]
    data: str = ""
    mix: str
    seconds: float
    samples: int
    seed: int
    p99_budget_ms: float | None = None
    server_runs: int = 6
    workers: int = 1
    idle_seconds: float = 1.0
    repeats: int = 6
    swaps_per_s: float = 20.0
    new_tokens: int | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
