"""Writing customers' files beside the training: a flush to the disk takes as long as a step on a GPU."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.io.threads import finish
from qrlora_deploy.training.fleet.customers import Customer
from qrlora_deploy.training.fleet.model import Learnt
from qrlora_deploy.training.fleet.summary import RUN, Line, run_digest, trained_line
from qrlora_deploy.training.record import Ran, training_record

WRITERS = 4


@dataclass(frozen=True)
class Origin:
    """What all customers of a fleet come from, for their files.

    Attributes:
        base_name: folder or hub name of the base.
        base_digest: of its tensors.
        basis_digest: of the basis.
        basis_file: where the basis is.
    """

    base_name: str
    base_digest: str
    basis_digest: str
    basis_file: str

    @property
    def digests(self) -> dict[str, str]:
        """As `run_digest` takes them."""
        return {"basis_digest": self.basis_digest, "base_digest": self.base_digest}


@dataclass(frozen=True)
class Trained:
    """A customer that is done.

    Attributes:
        customer: who.
        ran: what became of its run.
        learnt: what is written.
    """

    customer: Customer
    ran: Ran
    learnt: Learnt


class Writer:
    """Makes and writes each file at once, in threads of its own; a customer counts when its file is there.

    Args:
        origin: of every customer.
    """

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self._threads = ThreadPoolExecutor(WRITERS, "customers")
        self._pending: deque[Future[Line]] = deque()

    def write(self, trained: Trained, path: Path) -> None:
        """Begin to write a customer's file."""
        self._pending.append(self._threads.submit(self._write, trained, path))

    def _write(self, trained: Trained, path: Path) -> Line:
        customer = trained.customer
        # The training record, with the entries of `trainer.train` and one digest for resuming.
        record = training_record(customer.train, customer.evaluation, customer.settings, trained.ran)
        record |= {RUN: run_digest(customer, self.origin.digests)}
        coefficients = Coefficients(
            values=trained.learnt.values,
            base_name=self.origin.base_name,
            task=customer.outputs.task.name,
            labels=customer.outputs.labels,
            head=trained.learnt.head,
            basis_file=self.origin.basis_file,
            training=record,
            thresholds=trained.ran.tuned.thresholds,
            basis_digest=self.origin.basis_digest,
            base_digest=self.origin.base_digest,
        )
        write_coefficients(coefficients, path)
        return trained_line(customer.name, path, record)

    def written(self, wait: bool = False) -> Iterator[Line]:
        """The lines of customers whose files have been written since the last call.

        Args:
            wait: until all of them are.

        Raises:
            QrloraError: the disk is full or refuses the write.
        """
        while self._pending and (wait or self._pending[0].done()):
            yield self._pending.popleft().result()

    def close(self) -> None:
        """End the threads when they have written what they began, however many signals come meanwhile.

        Raises:
            KeyboardInterrupt: one came; everything is written.
        """
        finish(self._threads.shutdown)
