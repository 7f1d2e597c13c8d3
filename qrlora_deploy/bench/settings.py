"""What a benchmark is asked to do."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qrlora_deploy.bench.report_parts import DECODER_SCENARIOS, SCENARIOS, Scenario
from qrlora_deploy.bench.subjects import Mix
from qrlora_deploy.errors import InputError, argument

PEERS = ("torch-eager", "torch-compile", "peft")
Peer = Literal["torch-eager", "torch-compile", "peft"]

Progress = Callable[[str, int, int], None]


DAY = 86_400.0

BOUNDS: dict[str, float] = {
    "seconds": 7 * DAY,
    "samples": 10**7,
    "p99_budget_ms": 1000 * DAY,
    "server_runs": 1000,
    "workers": 1024,
    "idle_seconds": DAY,
    "repeats": 100_000,
    "swaps_per_s": 10**6,
    "threads": 1024,
    "new_tokens": 2**20,
    "ttft_ms": 1000 * DAY,
    "tpot_ms": 1000 * DAY,
}
"""The most that each setting can be; all are above 0. Beyond lies no measurement that ends."""

MAX_TOKENS = 2**24
"""Of a batch: 128 MB for each input. Refused before any memory is taken."""

USUAL_LENGTH = 128
"""Tokens of a row where no length is given."""


@dataclass(frozen=True)
class BenchSettings:
    """Settings of one benchmark.

    Attributes:
        bundles: folders, all measured in turn. The first is the baseline of the ratios where there
            is no reference.
        customers: folder of coefficients files for the switchable ones.
        scenarios: in any order; empty: generation for decoders, single-stream and offline for others.
        batches: rows, every number with every length.
        lengths: tokens of a row, or of a decoder's prompt; empty: 32 and 128, or the model's most.
        data: labelled file whose texts are the inputs instead, in their own lengths.
        provider: as for `open_session`.
        threads: as for `open_session`.
        cuda_graph: "off", "on", or "both", which makes two subjects of each bundle.
        peers: measured beside the bundles, from the folder `base`.
        reference: a bundle to be measured in turn with the others, or an earlier report.json.
        labelled: folder of customers' labelled files, for the accuracy.
        mix: whose the rows of a batch are.
        seconds: bound of each measurement, for all subjects together.
        samples: of each subject before a measurement may end; 368 are enough for the p99.
        p99_budget_ms: for the scenario server; None: five times the slowest single run's median.
        server_runs: rates that are tried.
        workers: threads that answer.
        idle_seconds: of rest before a request.
        repeats: of rests and of cold starts.
        swaps_per_s: in the scenario swap.
        new_tokens: of a decoder's answers; None: 32.
        ttft_ms: budget of a decoder's time to first token, for the goodput.
        tpot_ms: budget of its time per output token.
        seed: of every random choice.
    """

    bundles: tuple[Path, ...]
    customers: Path | None = None
    scenarios: tuple[Scenario, ...] = ()
    batches: tuple[int, ...] = (1, 8)
    lengths: tuple[int, ...] = ()
    data: Path | None = None
    provider: str = "cpu"
    threads: int | None = None
    cuda_graph: Literal["off", "on", "both"] = "off"
    peers: tuple[Peer, ...] = ()
    base: Path | None = None
    reference: Path | None = None
    labelled: Path | None = None
    mix: Mix = "different"
    seconds: float = 20.0
    samples: int = 368
    p99_budget_ms: float | None = None
    server_runs: int = 6
    workers: int = 1
    idle_seconds: float = 1.0
    repeats: int = 6
    swaps_per_s: float = 20.0
    new_tokens: int | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked before anything is opened.

        Raises:
            InputError: naming the argument.
        """
        if not self.bundles:
            raise InputError("give at least one bundle to measure")
        if self.data is not None and self.lengths:
            raise InputError(
                f"{argument('lengths')} and {argument('data')} exclude each other: texts have their own lengths"
            )
        self._check_sizes()
        if not self.batches:
            raise InputError(f"give at least one {argument('batches')}")
        known = dict.fromkeys((*SCENARIOS, *DECODER_SCENARIOS))
        unknown = [name for name in self.scenarios if name not in known]
        if unknown:
            raise InputError(f"{argument('scenarios', unknown)}: choose from {', '.join(known)}")
        if self.peers and self.base is None:
            raise InputError(
                f"{argument('peers', self.peers)} needs {argument('base')}, the folder of the Hugging Face checkpoint"
            )
        if self.cuda_graph != "off" and self.provider != "cuda":
            raise InputError(
                f"{argument('cuda_graph', self.cuda_graph)} needs {argument('provider', 'cuda')}, not {self.provider}"
            )

    def _check_sizes(self) -> None:
        for option, sizes in ((argument("batches"), self.batches), (argument("lengths"), self.lengths)):
            if any(size < 1 for size in sizes):
                raise InputError(f"{option} must be at least 1, not {min(sizes)}")
        for name, most in BOUNDS.items():
            value = getattr(self, name)
            # Written so that nan is refused too.
            if value is not None and not 0 < value <= most:
                raise InputError(f"{argument(name)} must be above 0 and at most {most:g}, not {value}")
        batch, length = max(self.batches, default=1), max(self.lengths, default=USUAL_LENGTH)
        if batch * length > MAX_TOKENS:
            options = (
                f"{argument('batches', [batch])} and {argument('lengths', [length])}"
                if self.lengths
                else argument("batches", [batch])
            )
            raise InputError(f"{options}: a batch of more than {MAX_TOKENS} tokens is none that is served")

    @property
    def earlier(self) -> Path | None:
        """The reference, where it is an earlier report and not a bundle."""
        return self.reference if self.reference is not None and not self.reference.is_dir() else None
