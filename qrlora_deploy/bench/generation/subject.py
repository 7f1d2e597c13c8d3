"""A decoder's bundle, ready to be measured."""

from collections.abc import Sequence

import numpy as np

from qrlora_deploy.bench.generation.load import Timeline, answer_load
from qrlora_deploy.bench.subjects import Call, OpenBundle, Spec, describe_bundle
from qrlora_deploy.bench.workload import Workload
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.runtime.bundle.bundle import Bundle, open_bundle
from qrlora_deploy.runtime.generation.requests import GenerationRequest
from qrlora_deploy.runtime.generation.session import GenerationSession
from qrlora_deploy.runtime.sessions.session import PROVIDERS

CACHE_BYTES = 2**40
"""No bound: how many answers run side by side decides how much is taken."""

SHORT_TOKENS = 2
"""Of the answers of a run that is not measured."""


class DecoderSubject(OpenBundle):
    """A decoder's bundle in a generation session. Greedy answers of a fixed length, none of a prompt known before.

    Attributes:
        session: open.
        served: whether the bundle is for many customers.

    Raises:
        InputError, FileFormatError, ProviderError: the bundle cannot be opened that way, or prompts and answers are
            together more than the model takes.
    """

    def __init__(self, spec: Spec, workloads: Sequence[Workload], bundle: Bundle | None = None) -> None:
        super().__init__(spec, bundle or open_bundle(spec.path))
        check_room(self.bundle, workloads, spec.new_tokens)
        self.session = GenerationSession(
            self.bundle,
            spec.provider,
            max_rows=max((workload.batch for workload in workloads), default=1),
            max_cache_bytes=CACHE_BYTES,
            prefix_bytes=0,
            threads=spec.threads,
            cuda_graphs=spec.cuda_graph,
        )
        self.served = self.session.customers is not None
        if self.session.customers is not None:
            self.load_customers(self.session.customers.load)
        self.record = describe_bundle(spec, self.bundle, PROVIDERS[spec.provider])
        self.record.options["new_tokens"] = str(spec.new_tokens)

    def prepare(self, workload: Workload) -> Call:
        """A whole run of a workload: a batch of requests at once, to the last token."""
        return lambda turn: self.run(workload, turn)

    def short(self, workload: Workload) -> Call:
        """A run of answers of two tokens, for warming up."""
        return lambda turn: self.run(workload, turn, SHORT_TOKENS)

    def run(self, workload: Workload, turn: int, new_tokens: int | None = None) -> list[Timeline]:
        """Answer the batch of a turn."""
        return answer_load(self.session, self.requests(workload, turn, new_tokens))[0]

    def requests(self, workload: Workload, turn: int, new_tokens: int | None = None) -> list[GenerationRequest]:
        """The requests of a turn, each batch of other tokens; their customers are those of `owners`."""
        owners = self.owners(workload.batch)
        if workload.length is None:
            prompts: Sequence[object] = workload.texts[turn % len(workload.texts)]
        else:
            random = np.random.default_rng([workload.seed, turn])
            size = (workload.batch, workload.length)
            prompts = random.integers(0, self.session.vocabulary, size).tolist()
        count = new_tokens or self.spec.new_tokens
        return [
            GenerationRequest(prompt, owner, max_tokens=count, ignore_end=True)  # type: ignore[arg-type]
            for prompt, owner in zip(prompts, owners, strict=True)
        ]


def check_room(bundle: Bundle, workloads: Sequence[Workload], new_tokens: int) -> None:
    """Make sure that a decoder's context holds every prompt with its answer.

    Raises:
        InputError: it does not.
    """
    most = bundle.manifest.max_length
    longest = max((workload.length or 1 for workload in workloads), default=1)
    if longest + new_tokens > most:
        raise InputError(
            f"a prompt of {longest} tokens with {argument('new_tokens', new_tokens)}: {bundle.folder} takes at most "
            f"{most} tokens, its answer included"
        )
