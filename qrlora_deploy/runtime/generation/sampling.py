"""How the next token of a row is chosen from its logits.

A row's random numbers come from its own seed and the number of its token alone, so its neighbours in a batch never
change what it draws.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from qrlora_deploy.errors import InputError, QrloraError, argument
from qrlora_deploy.runtime.generation.drawing import Filters, best, draw, log_sum
from qrlora_deploy.runtime.generation.wishes import CANDIDATES, EVERY, MANY, WHOLE_SHARE, Wish

MOST_SEED = 2**64 - 1
MOST_LOGPROBS = 20

PHILOX_ROUNDS = 10
PHILOX_FACTORS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
PHILOX_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
"""Of Philox 4x64 (Salmon and others, "Parallel random numbers: as easy as 1, 2, 3", 2011)."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the default is greedy.

    The steps are those of transformers, in its order: repetition penalty, presence and frequency penalty,
    temperature, top-k, top-p, min-p.

    Attributes:
        temperature: divides the logits; 0 is greedy: the best token, of several equal ones the lowest id.
        top_k: keep so many best tokens; 0 keeps all. Of equal ones the lower ids are better.
        top_p: keep the best tokens until their probabilities reach this sum.
        min_p: keep tokens of at least this share of the best one's probability.
        repetition_penalty: logits of tokens of prompt and answer are divided by it where they are positive, else
            multiplied.
        presence_penalty: subtracted from the logits of tokens of the answer.
        frequency_penalty: subtracted once for every time that the answer has the token.
        seed: of the random numbers, if there are any; None draws one, which the answer tells.
        logprobs: None tells none; 0 tells those of the chosen tokens, n also those of the n best ones.

    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                _check(field.name, value)

    @property
    def greedy(self) -> bool:
        """Whether no random number is drawn."""
        return self.temperature == 0

    @property
    def takes_likeliest(self) -> bool:
        """Whether the likeliest token of the model is the one that is chosen, and nothing else is told."""
        return self.greedy and not self.penalizes and self.logprobs is None

    @property
    def penalizes(self) -> bool:
        """Whether the tokens before change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0, 100, "between 0 (greedy) and 100"),
    "top_k": (0, 2**31 - 1, "a whole number of at least 0 (all tokens)"),
    "top_p": (1e-12, 1, "above 0 and at most 1"),
    "min_p": (0, 1, "between 0 and 1"),
    "repetition_penalty": (1e-6, 1e6, "above 0"),
    "presence_penalty": (-100, 100, "between -100 and 100"),
    "frequency_penalty": (-100, 100, "between -100 and 100"),
    "seed": (0, MOST_SEED, "a whole number from 0 to 2**64 - 1"),
    "logprobs": (0, MOST_LOGPROBS, f"a whole number from 0 to {MOST_LOGPROBS}"),
}
WHOLE = ("top_k", "seed", "logprobs")


def _check(name: str, value: object) -> None:
    if wrong := out_of_range(name, value):
        raise InputError(f"{argument(name)} {wrong}")


def out_of_range(name: str, value: object) -> str:
    """What is wrong with a value of an attribute of `Sampling`, as the end of a sentence; empty: nothing is."""
    least, most, words = RANGES[name]
    kinds = (int,) if name in WHOLE else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        return f"must be {words}, not {value!r:.40}"
    return ""


@dataclass(frozen=True)
class Choice:
    """A token that was chosen.

    Attributes:
        token: its id.
        logprob: log of its probability by the model alone, before penalties and temperature; None where none was
            asked for.
        best: the ids of the best tokens and their logs, the best first.
    """

    token: int
    logprob: float | None = None
    best: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one row.

    Args:
        sampling: how.
        prompt: ids of the prompt.

    Attributes:
        seed: of its random numbers; None where there are none.
        takes_likeliest: as of its `Sampling`.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        drawn = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self.seed = None if sampling.greedy else drawn
        # Asked for at every token.
        self.takes_likeliest, self._penalizes = sampling.takes_likeliest, sampling.penalizes
        self._step = 0
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._counts: dict[int, int] = {}

    def choose(self, logits: np.ndarray) -> Choice:
        """The next token, by `logits [vocabulary]` fp32, which are not changed.

        Raises:
            QrloraError: the logits hold NaN or +inf, or no finite number.
        """
        _check_logits(logits)
        penalized = self._penalized(logits) if self._penalizes else logits
        token = self._draw(penalized)
        self._note(token)
        if self.sampling.logprobs is None:
            return Choice(token)
        return _with_logprobs(logits, token, self.sampling.logprobs)

    def wish(self, vocabulary: int) -> Wish | None:
        """The next token as it is asked for where the logits lie; None: all of them must be looked at.

        Args:
            vocabulary: how many logits there are.
        """
        sampling = self.sampling
        if self._penalizes or CANDIDATES < sampling.top_k < vocabulary:
            return None
        if self.seed is None:
            return Wish(1.0, 1, WHOLE_SHARE, 0.0, 0.0, sampling.logprobs)
        top_p = WHOLE_SHARE if sampling.top_p == 1 else sampling.top_p
        top_k = float(sampling.top_k)
        if not 0 < top_k < vocabulary:
            bounded = sampling.top_p < 1 or sampling.min_p > 0
            top_k = EVERY if not bounded else vocabulary if vocabulary <= CANDIDATES else MANY
        share = uniform(self.seed, self._step)
        return Wish(sampling.temperature, top_k, top_p, sampling.min_p, share, sampling.logprobs)

    def take(self, choice: Choice) -> Choice:
        """The next token, which was chosen elsewhere: as it was wished, or likeliest where `takes_likeliest`."""
        self._note(choice.token)
        return choice

    def _draw(self, logits: np.ndarray) -> int:
        if self.sampling.greedy:
            return int(logits.argmax())
        assert self.seed is not None
        sampling = self.sampling
        filters = Filters(sampling.top_k, sampling.top_p, sampling.min_p)
        return draw(logits, sampling.temperature, filters, uniform(self.seed, self._step))

    def _note(self, token: int) -> None:
        self._step += 1
        if self._penalizes:
            self._seen.add(token)
            self._counts[token] = self._counts.get(token, 0) + 1

    def _penalized(self, logits: np.ndarray) -> np.ndarray:
        changed, sampling = logits.astype(np.float64), self.sampling
        if sampling.repetition_penalty != 1:
            seen = np.fromiter((token for token in self._seen if token < len(logits)), dtype=np.int64)
            values = changed[seen]
            divided, multiplied = values / sampling.repetition_penalty, values * sampling.repetition_penalty
            changed[seen] = np.where(values > 0, divided, multiplied)
        if self._counts:
            tokens = np.fromiter(self._counts, dtype=np.int64)
            counts = np.fromiter(self._counts.values(), dtype=np.float64)
            changed[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        return changed


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that follows from seed and step alone.

    The first one of numpy's `Generator(Philox(key=[seed, step]))`, which takes three times as long to be made.
    """
    first, second, third, fourth, key, other = 1, 0, 0, 0, seed, step
    for _ in range(PHILOX_ROUNDS):
        here, there = PHILOX_FACTORS[0] * first, PHILOX_FACTORS[1] * third
        first, second = (there >> 64) ^ second ^ key, there & MOST_SEED
        third, fourth = (here >> 64) ^ fourth ^ other, here & MOST_SEED
        key, other = key + PHILOX_STEPS[0] & MOST_SEED, other + PHILOX_STEPS[1] & MOST_SEED
    return (first >> 11) * 2.0**-53


def _with_logprobs(logits: np.ndarray, token: int, count: int) -> Choice:
    total = log_sum(logits)
    ids = best(logits, min(count, len(logits))) if count else np.empty(0, dtype=np.int64)
    # Stable: of equal ones the lowest is the first.
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return Choice(token, float(logits[token]) - total, tuple((int(one), float(logits[one]) - total) for one in ids))


def _check_logits(logits: np.ndarray) -> None:
    # One pass: the largest is NaN where any is.
    largest = logits.max()
    if not math.isfinite(largest):
        raise QrloraError(f"the model gave {largest} for a token; its weights or this customer's numbers are unusable")
