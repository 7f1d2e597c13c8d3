"""The rules of a gate, read from a TOML file."""

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from qrlora_deploy.errors import library_errors
from qrlora_deploy.io.reading import read_text
from qrlora_deploy.io.strict import Record, from_value

Statistic = Literal["p50", "p90", "p95", "p99", "p99.9"]
Shape = Field(default=None, pattern=r"^\d+x(\d+|texts)$")

EXAMPLE = """\
# What a rollout must keep to: qrlora-deploy bench BUNDLE --gate gate.toml
# Leave out what you do not want; every rule that is here must be met by every bundle (not by the
# reference, nor by peers). A rule that nothing was measured for fails.

# A measurement whose last three windows differ by more than 10 % decides nothing, so its rules fail.
# true lets them be judged all the same.
allow_unstable = false

# Latency, as often as you like. Give max_ms, max_ratio or both.
[[latency]]
statistic = "p99"            # p50, p90, p95, p99 or p99.9; too few samples for it fail
scenario = "single-stream"   # or "idle-gap", "cold-start", "swap"
shape = "1x32"               # batch x length, or 1xtexts for texts of data; left out: every shape
max_ms = 50.0

[[latency]]
statistic = "p50"
max_ratio = 1.05             # to the reference (a bundle or an earlier report.json), or to
                             # the first bundle; the whole 95 % interval must be below it

# Rows per second of the scenario offline.
[[throughput]]
min_rows_per_s = 10.0
# min_ratio = 0.95

# Decoders, in the scenario generation, as often as you like; every limit that is here must be met.
# [[generation]]
# statistic = "p99"          # of the three limits in milliseconds
# shape = "8x128"            # answers side by side x tokens of the prompt; left out: every shape
# max_ttft_ms = 500.0        # time to first token
# max_tpot_ms = 50.0         # time per output token, an answer's mean
# max_itl_ms = 100.0         # every single time between two tokens
# min_tokens_per_s = 100.0   # of all answers together, the median of the runs
# min_goodput_per_s = 2.0    # answers a second within the budgets of the measurement
# max_ttft_ratio = 1.05      # medians to the reference, or to the first bundle; the whole interval counts
# max_tpot_ratio = 1.05
# min_tokens_ratio = 0.95

# Requests per second at which the scenario server keeps its p99 within a budget.
# [capacity]
# min_requests_per_s = 20.0
# p99_ms = 100.0             # the budget; left out: that of the measurement

# Logits against PyTorch's, which the bundle carries.
[parity]
max_abs_error = 0.001
min_label_agreement = 0.99

[size]
max_bundle_bytes = 2000000000
max_customer_bytes = 100000

[memory]
max_host_bytes = 8000000000
# max_device_bytes = 8000000000

# Right answers on labelled files, one for each customer; paths are from this file's folder. A decoder's answer is
# right where greedy writing gives it to the last token.
# [accuracy]
# min = 0.8
# max_drop = 0.0             # at most so much below the base's own accuracy on the same file
# max_drop_to_reference = 0.01   # the same, below the reference's or the earlier report's
# max_nll = 1.5              # of a decoder: the mean loss of an answer's token
# max_nll_over_base = 0.0    # at most so much above the base's own on the same file
# max_nll_over_reference = 0.01
# [accuracy.data]
# acme = "acme-test.tsv"
"""


class _Rule(Record):
    @model_validator(mode="after")
    def _has_a_limit(self) -> "_Rule":
        limits = [name for name in type(self).model_fields if name.startswith(("max", "min"))]
        if all(getattr(self, name) is None for name in limits):
            raise ValueError(f"needs one of {', '.join(limits)}")
        return self


class LatencyRule(_Rule):
    """A percentile in milliseconds, absolute and to the baseline.

    The scenario server is none of these: it tries rates that are too high on purpose.
    """

    statistic: Statistic = "p99"
    scenario: Literal["single-stream", "idle-gap", "cold-start", "swap"] = "single-stream"
    shape: str | None = Shape
    variant: str | None = None
    max_ms: float | None = Field(default=None, gt=0)
    max_ratio: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _is_compared(self) -> "LatencyRule":
        if self.max_ratio is not None and (self.scenario != "single-stream" or self.statistic not in ("p50", "p99")):
            raise ValueError("max_ratio is for the p50 and the p99 of single-stream, which are measured in turn")
        return self


class ThroughputRule(_Rule):
    """Rows per second of the scenario offline, the median of its blocks."""

    shape: str | None = Shape
    min_rows_per_s: float | None = Field(default=None, gt=0)
    min_ratio: float | None = Field(default=None, gt=0)


class GenerationRule(_Rule):
    """Tokens of decoders: percentiles in milliseconds, medians a second, and medians to the baseline."""

    statistic: Statistic = "p99"
    shape: str | None = Shape
    max_ttft_ms: float | None = Field(default=None, gt=0)
    max_tpot_ms: float | None = Field(default=None, gt=0)
    max_itl_ms: float | None = Field(default=None, gt=0)
    min_tokens_per_s: float | None = Field(default=None, gt=0)
    min_goodput_per_s: float | None = Field(default=None, gt=0)
    max_ttft_ratio: float | None = Field(default=None, gt=0)
    max_tpot_ratio: float | None = Field(default=None, gt=0)
    min_tokens_ratio: float | None = Field(default=None, gt=0)

    @property
    def compares(self) -> bool:
        """Whether a baseline is needed."""
        return any(limit is not None for limit in (self.max_ttft_ratio, self.max_tpot_ratio, self.min_tokens_ratio))


class CapacityRule(_Rule):
    """Requests per second of the scenario server, within `p99_ms` or else the budget of the measurement; of a decoder
    `p99_ms` is that of the time to first token.
    """

    min_requests_per_s: float = Field(gt=0)
    p99_ms: float | None = Field(default=None, gt=0)


class AccuracyRule(_Rule):
    """Share of right labels of every customer that has a labelled file; of a decoder, of answers that greedy writing
    gives to the last token, and the loss of a token.

    `max_drop` is below the base's; it needs a switchable bundle, and labels that the base has.
    """

    min: float | None = Field(default=None, ge=0, le=1)
    max_drop: float | None = Field(default=None, ge=0, le=1)
    max_drop_to_reference: float | None = Field(default=None, ge=0, le=1)
    max_nll: float | None = Field(default=None, gt=0)
    max_nll_over_base: float | None = None
    max_nll_over_reference: float | None = None
    data: dict[str, str] = {}


class ParityRule(_Rule):
    """Logits against PyTorch's."""

    max_abs_error: float | None = Field(default=None, gt=0)
    min_label_agreement: float | None = Field(default=None, ge=0, le=1)


class SizeRule(_Rule):
    """Files of a bundle together, and each customer's file."""

    max_bundle_bytes: int | None = Field(default=None, gt=0)
    max_customer_bytes: int | None = Field(default=None, gt=0)


class MemoryRule(_Rule):
    """Of a process that only runs the bundle: the largest resident set, and what it takes of the GPU."""

    max_host_bytes: int | None = Field(default=None, gt=0)
    max_device_bytes: int | None = Field(default=None, gt=0)


class GateRules(Record):
    """All of a file."""

    allow_unstable: bool = False
    latency: list[LatencyRule] = []
    throughput: list[ThroughputRule] = []
    generation: list[GenerationRule] = []
    capacity: CapacityRule | None = None
    accuracy: AccuracyRule | None = None
    parity: ParityRule | None = None
    size: SizeRule | None = None
    memory: MemoryRule | None = None

    @model_validator(mode="after")
    def _has_rules(self) -> "GateRules":
        if (
            not self.latency
            and not self.throughput
            and not self.generation
            and not any((self.capacity, self.accuracy, self.parity, self.size, self.memory))
        ):
            raise ValueError("there is no rule in it; `qrlora-deploy bench --gate-example` shows some")
        return self


def read_gate(path: Path) -> GateRules:
    """Read a gate file.

    Raises:
        InputError: it cannot be read.
        FileFormatError: it is no TOML, or has wrong or unknown keys,
            all of which are named.
    """
    text = read_text(path)
    with library_errors(f"{path} is not TOML"):
        record = tomllib.loads(text)
    return from_value(GateRules, record, str(path))


def labelled_data(rules: GateRules, path: Path) -> dict[str, Path]:
    """The labelled file of each customer that the gate at `path` names."""
    data = rules.accuracy.data if rules.accuracy is not None else {}
    return {customer: path.parent / name for customer, name in data.items()}
