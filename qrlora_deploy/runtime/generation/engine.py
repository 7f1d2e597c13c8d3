"""One step after another: rows join, prompts are read, every row gets its next token, rows leave."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime.generation.budget import CacheFullError
from qrlora_deploy.runtime.generation.choosing import Chooser
from qrlora_deploy.runtime.generation.graph import DecoderGraph
from qrlora_deploy.runtime.generation.holding import Held, Holder
from qrlora_deploy.runtime.generation.prefixes import PrefixCache
from qrlora_deploy.runtime.generation.requests import FinishReason, GenerationAnswer, GenerationEvent
from qrlora_deploy.runtime.generation.sampling import Choice
from qrlora_deploy.runtime.generation.scheduler import Group, Scheduler, Seat, in_turn
from qrlora_deploy.runtime.generation.writing import Writer


@dataclass(eq=False)
class Running:
    """A request on its way.

    Attributes:
        number: of the request.
        prompt: its ids.
        customer: whose it is.
        needed: tokens that prompt and answer may come to.
        writer: writes its answer.
        deadline: when it ends as it is, of the engine's clock; None: never.
        cancelled: whether nobody wants it any more; any thread may say so.
        events: what was not taken yet.
        seat: its place, once the engine has seen it.
        held: its customer's version, while it has a row.
        reused: tokens of the prompt that were not read again.
    """

    number: int
    prompt: list[int]
    customer: str | None
    needed: int
    writer: Writer
    deadline: float | None = None
    cancelled: bool = False
    events: deque[GenerationEvent] = field(default_factory=deque)
    seat: Seat | None = None
    held: Held | None = None
    reused: int = 0

    @property
    def reads(self) -> bool:
        """Whether it has a row and its prompt is not read to the end."""
        return self.seat is not None and self.seat.row is not None and self.seat.past < len(self.prompt)


class Engine:
    """Runs requests of one graph. Not safe for several threads, but for `arrive` and `Running.cancelled`.

    Args:
        graph: the decoder.
        scheduler: of its rows, whose groups have `KvCache`s, or `CudaKvCache`s.
        prefixes: beginnings of prompts that are kept.
        holder: of the customers' versions.
        base_digest: for the answers.
        block_tokens: a prompt is read in blocks of so many tokens.
        step_tokens: tokens of prompts that are read in one step, so that answers that are being written go on; at
            least one block is read.
        clock: seconds.
        chooser: of the next tokens; None: with threads of its own.

    Attributes:
        arrivals: requests that no step has seen yet.
    """

    def __init__(
        self,
        graph: DecoderGraph,
        scheduler: Scheduler,
        prefixes: PrefixCache,
        holder: Holder,
        base_digest: str,
        block_tokens: int,
        step_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        chooser: Chooser | None = None,
    ) -> None:
        self._chooser = chooser or Chooser()
        self._graph, self._scheduler, self._prefixes, self._holder = graph, scheduler, prefixes, holder
        self._base_digest, self._block, self._step = base_digest, block_tokens, step_tokens
        self.clock = clock
        self.arrivals: deque[Running] = deque()
        self._living: list[Running] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._living and not self.arrivals

    def arrive(self, running: Running) -> None:
        """Take a request; for any thread."""
        self.arrivals.append(running)

    def step(self) -> None:
        """Let rows join and leave, read some of the prompts, and write a token of every answer."""
        while self.arrivals:
            running = self.arrivals.popleft()
            running.seat = self._scheduler.add(running, running.needed)
            self._living.append(running)
        self._end_unwanted()
        for seat in self._admitted():
            self._begin(seat.owner)
        self._read_prompts()
        for group in list(self._scheduler.groups.values()):
            self._write(group)

    def end_all(self, reason: FinishReason) -> None:
        """End every request as it is."""
        while self.arrivals:
            self._end(self.arrivals.popleft(), reason)
        for running in list(self._living):
            self._end(running, reason)

    def _end_unwanted(self) -> None:
        now = self.clock()
        for running in list(self._living):
            if running.cancelled:
                self._end(running, "cancelled")
            elif running.deadline is not None and now >= running.deadline:
                self._end(running, "deadline")

    def _admitted(self) -> list[Seat]:
        """Who gets a row now; the first one who waits is refused where even an empty device has no memory for it."""
        try:
            return self._scheduler.admit()
        except CacheFullError as error:
            self._end(self._scheduler.waiting[0].owner, "error", error)
            return []

    def _begin(self, running: Running) -> None:
        """Hold the customer's version, and put what is known of the prompt's beginning into the row."""
        seat = running.seat
        assert seat is not None and seat.row is not None
        try:
            running.held = self._holder.hold(running.customer)
        except QrloraError as error:
            self._end(running, "error", error)
            return
        cache = self._cache(seat)
        for block in self._prefixes.find(running.held.numbers, running.prompt):
            cache.write(seat.row, seat.past, block)
            seat.past += self._block
        running.reused = seat.past

    def _read_prompts(self) -> None:
        reading = [running.seat for running in self._living if running.reads and running.seat is not None]
        for seat in in_turn(reading, self._step, self._chunk):
            try:
                self._read(seat)
            except QrloraError as error:
                self._end(seat.owner, "error", error)

    def _chunk(self, seat: Seat) -> int:
        return min(self._block, len(seat.owner.prompt) - seat.past)

    def _read(self, seat: Seat) -> None:
        """One block of a prompt; behind the last one the answer begins."""
        running: Running = seat.owner
        cache, tokens = self._cache(seat), self._chunk(seat)
        assert seat.row is not None and running.held is not None
        chunk = running.prompt[seat.past : seat.past + tokens]
        answers = self._graph.prefill(cache, seat.row, chunk, seat.past, running.held.slot, self._holder.memory)
        if tokens == self._block:
            row, start, size_bytes = seat.row, seat.past, cache.shape.token_bytes(tokens)
            self._prefixes.keep(
                running.held.numbers,
                running.prompt,
                start // self._block,
                size_bytes,
                lambda: cache.read(row, start, start + tokens),
            )
        seat.past += tokens
        if not running.reads:
            self._take(running, self._chooser.all({0: running.writer.sampler}, answers)[0])

    def _write(self, group: Group) -> None:
        """The next token of every answer of a group, in one run."""
        writing = {row: seat for row, seat in group.placement.rows.items() if seat.owner.writer.choices}
        if not writing:
            return
        size = group.placement.size
        tokens, past, slots = (np.zeros(size, dtype=np.int64) for _ in range(3))
        for row, seat in group.placement.rows.items():
            # A row whose prompt is being read runs along: what is written behind its tokens is overwritten by the next.
            past[row], slots[row] = seat.past, seat.owner.held.slot
            if row in writing:
                tokens[row] = seat.owner.writer.choices[-1].token
        try:
            answers = self._graph.decode(group.cache, tokens, past, slots, self._holder.memory)
        except QrloraError as error:
            for seat in writing.values():
                self._end(seat.owner, "error", error)
            return
        for seat in writing.values():
            # All of them before the first one leaves: then others move, with as many tokens as they have.
            seat.past += 1
        choices = self._chooser.all({row: seat.owner.writer.sampler for row, seat in writing.items()}, answers)
        for row, seat in writing.items():
            self._take(seat.owner, choices[row])

    def _take(self, running: Running, choice: Choice | QrloraError) -> None:
        """Tell a token; the row leaves where it was the last."""
        if isinstance(choice, QrloraError):
            self._end(running, "error", type(choice)(f"{running.customer or 'the base'}: {choice}"))
            return
        piece = running.writer.write(choice)
        running.events.append(GenerationEvent(running.number, piece, (choice,), shown=running.writer.shown))
        if running.writer.finished is not None:
            self._end(running, running.writer.finished)

    def _end(self, running: Running, reason: FinishReason, error: QrloraError | None = None) -> None:
        rest = running.writer.finish(reason) if running.writer.finished is None else ""
        answer = self._answer(running, error)
        running.events.append(GenerationEvent(running.number, rest, (), answer, running.writer.shown))
        if running.seat is not None:
            if error is not None and running.seat.row is not None:
                # What is no number in it would spoil the answers of who gets it next.
                self._cache(running.seat).clear_row(running.seat.row)
            self._scheduler.leave(running.seat)
            self._living.remove(running)
        if running.held is not None:
            self._holder.release(running.held)

    def _answer(self, running: Running, error: QrloraError | None) -> GenerationAnswer:
        writer = running.writer
        assert writer.finished is not None
        return GenerationAnswer(
            text=writer.text,
            tokens=tuple(choice.token for choice in writer.choices),
            finish_reason="error" if error is not None else writer.finished,
            customer=running.customer,
            base_digest=self._base_digest,
            stop=writer.stop,
            customer_digest=running.held.digest if running.held is not None else "",
            prompt_tokens=len(running.prompt),
            reused_tokens=running.reused,
            seed=writer.sampler.seed,
            logprobs=tuple(writer.choices[: writer.shown]) if writer.sampler.sampling.logprobs is not None else (),
            error=error,
        )

    def _cache(self, seat: Seat) -> Any:
        """A `KvCache` or a `CudaKvCache`; their blocks are as different as they are."""
        return self._scheduler.groups[seat.capacity].cache
