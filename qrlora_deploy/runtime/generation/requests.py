"""What is asked of a generation session, and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qrlora_deploy.errors import InputError, QrloraError, argument
from qrlora_deploy.runtime.generation.sampling import Choice, Sampling
from qrlora_deploy.runtime.generation.stopping import check_stops

DEFAULT_TOKENS = 256

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
"""Why an answer ended: the model's end or a stop string; `max_tokens` or the end of the context; the asker went away;
time ran out; the model failed or the request was refused."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt.

    Attributes:
        prompt: a text, ids of tokens, or the messages of a chat, each with "role" and "content", which the bundle's
            chat template turns into a text.
        customer: whose; None is the base.
        sampling: how tokens are chosen.
        max_tokens: tokens of the answer at most; fewer where the model's context ends before.
        stop: texts before which the answer ends; they are no part of it.
        timeout_s: seconds after which the answer ends as it is, waiting included; None: no bound.
        ignore_end: go on where the model ends its answer, up to `max_tokens`: for measuring.

    Raises:
        InputError: a value is out of its range.
    """

    prompt: str | Sequence[int] | Sequence[Mapping[str, str]]
    customer: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = DEFAULT_TOKENS
    stop: Sequence[str] = ()
    timeout_s: float | None = None
    ignore_end: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise InputError(
                f"{argument('max_tokens')} must be a whole number of at least 1, not {self.max_tokens!r:.40}"
            )
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise InputError(f"{argument('timeout_s')} must be above 0 seconds, not {self.timeout_s!r:.40}")
        object.__setattr__(self, "stop", check_stops(self.stop))


@dataclass(frozen=True)
class GenerationAnswer:
    """The end of a request.

    Attributes:
        text: of the answer.
        tokens: ids that were chosen, with the one that ended it.
        finish_reason: why it ended.
        stop: the stop string that ended it; None where none did.
        customer: as asked.
        customer_digest: `Coefficients.digest` of the version that answered; empty for the base, and where nothing was
            answered.
        base_digest: of the base's weights.
        prompt_tokens: tokens of the prompt.
        reused_tokens: of these, how many were read for an earlier prompt that began alike.
        seed: of the random numbers: the same request with it gives the same answer. None: it was greedy.
        logprobs: of each token, where they were asked for, but for those that a stop string begins with and what is
            behind them: they do not show.
        error: why it was refused or failed; None where it was not.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    customer: str | None
    base_digest: str
    stop: str | None = None
    customer_digest: str = ""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    seed: int | None = None
    logprobs: tuple[Choice, ...] = ()
    error: QrloraError | None = None


@dataclass(frozen=True)
class GenerationEvent:
    """Something that happened to a request.

    Attributes:
        number: of the request, from 0 on in the order given.
        text: what the answer grew by; may be empty where a character or a stop string is not complete.
        choices: the tokens that were chosen meanwhile.
        answer: the whole answer, with the last event of a request; else None.
        shown: how many of all tokens so far show: the others may be those of a stop string.
    """

    number: int
    text: str = ""
    choices: tuple[Choice, ...] = ()
    answer: GenerationAnswer | None = None
    shown: int = 0
