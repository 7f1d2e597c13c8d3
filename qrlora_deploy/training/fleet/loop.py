"""The loop of a fleet: customers enter, train side by side, are written when they are done, and leave."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.capacity import segment_rows
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.training.fleet.customers import Customer, FleetCustomers
from qrlora_deploy.training.fleet.engine import Engine, free_share
from qrlora_deploy.training.fleet.labels import score_labels
from qrlora_deploy.training.fleet.model import FleetModel
from qrlora_deploy.training.fleet.options import FleetOptions
from qrlora_deploy.training.fleet.schedule import Schedule
from qrlora_deploy.training.fleet.scoring import Answers, score_answers
from qrlora_deploy.training.fleet.summary import FAILED, Line, finished_line, resumed_text, run_digest
from qrlora_deploy.training.fleet.tokens import RowEncoder, TokenRows, TokensAhead
from qrlora_deploy.training.fleet.writing import Origin, Trained, Writer
from qrlora_deploy.training.label_likelihoods import LabelRows
from qrlora_deploy.training.record import Ran
from qrlora_deploy.training.settings import TrainSettings, diverged
from qrlora_deploy.training.trunk.memory import free_bytes
from qrlora_deploy.training.tuning import Tuned

Progress = Callable[[int, int, int], None]


@dataclass
class _Active:
    """A customer in training.

    Attributes:
        customer: who.
        metric: chooses the best epoch.
        remark: what a user may not expect of its run.
        baseline: metrics before training.
        metrics: of the best epoch so far.
        waited: epochs since then.
        loss: mean of the last epoch.
        tuned: the thresholds of the best epoch, where they are chosen.
        label_rows: as of its `TokenRows`.
    """

    customer: Customer
    metric: str
    remark: str = ""
    baseline: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    waited: int = 0
    loss: float = 0.0
    tuned: Tuned = field(default_factory=Tuned)
    label_rows: LabelRows | None = None

    def is_better(self, metrics: dict[str, float]) -> bool:
        """Whether these are better than those of every epoch so far."""
        if not self.metrics:
            return True
        sign = -1 if self.metric in self.customer.outputs.task.lower_is_better else 1
        return sign * metrics[self.metric] > sign * self.metrics[self.metric]


class Fleet:
    """The loop and what it knows of each active customer."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        basis: Basis,
        settings: TrainSettings,
        options: FleetOptions,
        chosen: FleetCustomers,
        device: torch.device,
    ) -> None:
        self.settings, self.options, self.device = settings, options, device
        self.origin = Origin(checkpoint.name, checkpoint.digest, basis.digest, options.basis_file)
        self.lines = {name: Line(name, FAILED, reason) for name, reason in chosen.refused.items()}
        self.failed = len(self.lines)
        waiting = self._waiting(chosen.customers) if options.resume else chosen.customers
        self.total = len(chosen.customers) + len(chosen.refused)
        # The longest first: at the end few would be left to train beside each other.
        self.queue = deque(sorted(waiting, key=lambda customer: -len(customer.train)))
        self.ready: TokenRows | None = None
        self.active: dict[int, _Active] = {}
        self.slots = options.slots(device.type, settings.batch_size, len(waiting))
        self.tokens: TokensAhead | None = None
        if waiting:
            labels = max(len(customer.outputs.labels) for customer in waiting)
            model = FleetModel(checkpoint, basis, settings, self.slots, labels, device)
            free = free_bytes("device" if device.type == "cuda" else "host", device, options.output)
            self.engine = Engine(model, self.slots, settings, free_share(free))
            self.schedule = Schedule(self.slots, settings)
            segments = segment_rows(model.model, model.tokenizer)
            encoder = RowEncoder(
                model.tokenizer, list(model.pad), settings.max_length, segments, written=model.writes_text
            )
            self.tokens = TokensAhead(encoder, list(self.queue), 2 * self.slots)
        self.writer = Writer(self.origin)

    def run(self, progress: Progress | None) -> None:
        """Train until nobody is left."""
        try:
            self._report(progress)
            while self.queue or self.active:
                known = len(self.lines)
                self._admit()
                if self.active:
                    self._step()
                self._note(self.writer.written())
                if len(self.lines) != known:
                    self._report(progress)
            self._note(self.writer.written(wait=True))
            self._report(progress)
        finally:
            try:
                if self.tokens:
                    self.tokens.close()
            finally:
                # A second signal may come in between, and what is being written must become whole.
                self.writer.close()

    def _step(self) -> None:
        rows, rates = self.schedule.next_rows(), self.schedule.rates()
        ended = self.schedule.advance()
        self.engine.train_step(rows, rates, self.schedule.step)
        if len(ended):
            self._end_epochs(ended)

    def _note(self, lines: Iterable[Line]) -> None:
        for line in lines:
            self.lines[line.customer] = line

    def _report(self, progress: Progress | None) -> None:
        if progress:
            progress(len(self.lines), self.failed, self.total)

    def _waiting(self, customers: Sequence[Customer]) -> list[Customer]:
        """Those that a resumed run trains; the others get their line."""
        waiting, again = [], Counter[str]()
        for customer in customers:
            wanted = run_digest(customer, self.origin.digests)
            found = finished_line(customer, self.options.file_of(customer.name), wanted)
            if isinstance(found, Line):
                self.lines[customer.name] = found
                continue
            waiting.append(customer)
            again.update([found] if found else [])
        if self.options.tell is not None:
            kept, new = len(customers) - len(waiting), len(waiting) - again.total()
            self.options.tell(resumed_text(kept, again, new))
        return waiting

    def _admit(self) -> None:
        """Let customers in where a good part of the slots is free, so that the trunk runs over many at once."""
        free = self.schedule.free
        if not self.queue or len(free) < max(1, self.slots // 8):
            return
        entering: list[tuple[int, Customer, TokenRows]] = []
        tokens = 0
        for slot in free.tolist():
            rows = self._next_rows()
            if rows is None:
                break
            tokens += int(rows.lengths.sum())
            if not self.engine.has_room(tokens) and (self.active or entering):
                self.ready = rows  # until somebody has left
                break
            entering.append((slot, self.queue.popleft(), rows))
        if not entering:
            return
        slots, customers, parts = (list(column) for column in zip(*entering, strict=True))
        self.engine.enter(slots, customers, parts)
        for slot, customer, part in zip(slots, customers, parts, strict=True):
            self.schedule.enter(slot, int(self.engine.train_rows[slot]))
            remark = part.remark or customer.outputs.remark
            metric = self.settings.metric_of(customer.outputs.task)
            self.active[slot] = _Active(customer, metric, remark, label_rows=part.label_rows)
        judged = [slot for slot in slots if self.active[slot].customer.evaluation]
        known = [slot for slot in judged if not self.active[slot].customer.outputs.new]
        for slot, metrics in self._scores(self.engine.answer_held_out(known), known).items():
            self.active[slot].baseline = _rounded(metrics) | self._labels(slot)

    def _next_rows(self) -> TokenRows | None:
        """Tokens of the first in the queue; customers without usable rows have left it. None where nobody is left."""
        rows, self.ready = self.ready, None
        while rows is None and self.queue and self.tokens:
            found = self.tokens.take()
            if isinstance(found, InputError):
                self._fail(self.queue.popleft(), str(found))
            else:
                rows = found
        return rows

    def _end_epochs(self, ended: np.ndarray) -> None:
        losses = self.engine.take_losses(ended) / self.schedule.per_epoch[ended]
        for slot, loss in zip(ended.tolist(), losses.tolist(), strict=True):
            self.active[slot].loss = loss
            if not np.isfinite(loss):
                epoch = int(self.schedule.epoch[slot])
                self._drop(slot, diverged(f"the loss became {loss} in epoch {epoch}"))
        left = [slot for slot in ended.tolist() if slot in self.active]
        judged = [slot for slot in left if self.active[slot].customer.evaluation]
        self._judge(judged)
        left = [slot for slot in left if slot in self.active]
        done = [slot for slot in left if self._is_over(slot)]
        last = [slot for slot in done if not self.active[slot].customer.evaluation]
        if last:
            self.engine.model.keep(last)
        self._finish(done)
        self.schedule.next_epoch([slot for slot in left if slot in self.active])

    def _is_over(self, slot: int) -> bool:
        epochs = int(self.schedule.epoch[slot])
        return epochs == self.settings.epochs or self.active[slot].waited >= self.settings.patience

    def _judge(self, slots: list[int]) -> None:
        """Score some customers, and remember those whose epoch was their best."""
        better = []
        answers = self.engine.answer_held_out(slots)
        for slot, metrics in self._scores(answers, slots).items():
            active = self.active[slot]
            if active.is_better(metrics):
                active.metrics, active.waited = metrics, 0
                better.append(slot)
            else:
                active.waited += 1
        if better:
            self.engine.model.keep(better)
            self._tune(answers, better)

    def _tune(self, answers: Sequence[Answers], better: list[int]) -> None:
        """Choose the thresholds of customers whose epoch is their best so far."""
        if not self.settings.tune_thresholds:
            return
        for part in answers:
            own = set(part.slots.tolist()) if part.task.judges_labels else set()
            for slot in own.intersection(better):
                active = self.active[slot]
                active.tuned = part.tuned(slot, len(active.customer.outputs.labels))

    def _scores(self, answers: Sequence[Answers], slots: list[int]) -> dict[int, dict[str, float]]:
        """Metrics of some customers by their answers; those whose answers are no numbers are dropped."""
        found = score_answers(answers)
        for slot in set(slots) - found.keys():
            self._drop(slot, diverged("the model answers NaN or Inf: training diverged"))
        return found

    def _finish(self, slots: list[int]) -> None:
        """Customers that are done are written, and leave."""
        if not slots:
            return
        self.engine.model.return_to_best(slots)
        learnt = self.engine.model.best(slots, [self.active[slot].customer.outputs for slot in slots])
        for slot, found in zip(slots, learnt, strict=True):
            customer = self.active[slot].customer
            if not found.is_finite:
                self._drop(slot, diverged("training diverged: a coefficient is NaN or Inf"))
                continue
            self.active[slot].metrics |= self._labels(slot)
            self.writer.write(Trained(customer, self._ran(slot), found), self.options.file_of(customer.name))
            self._forget(slot)

    def _labels(self, slot: int) -> dict[str, float]:
        return score_labels(self.engine.model, slot, self.active[slot].label_rows)

    def _ran(self, slot: int) -> Ran:
        active = self.active[slot]
        return Ran(
            steps=int(self.schedule.step[slot]),
            epochs=float(self.schedule.epoch[slot]),
            metric=active.metric,
            metrics=_rounded(active.metrics),
            baseline=active.baseline,
            loss=round(active.loss, 6),
            device=self.device.type,
            remark=active.remark,
            tuned=active.tuned,
        )

    def _drop(self, slot: int, reason: str) -> None:
        self._fail(self.active[slot].customer, reason)
        self._forget(slot)

    def _fail(self, customer: Customer, reason: str) -> None:
        self.failed += 1
        self.lines[customer.name] = Line(customer.name, FAILED, reason, rows=len(customer.train))

    def _forget(self, slot: int) -> None:
        del self.active[slot]
        self.engine.leave(slot)
        self.schedule.leave(slot)


def _rounded(metrics: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in metrics.items()}
