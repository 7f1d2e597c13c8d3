"""The tokens of customers, made ahead of their training in a thread of their own."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from qrlora_deploy.data.cutting import cut_texts
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.lines import row_of
from qrlora_deploy.errors import InputError, first_line
from qrlora_deploy.io.threads import finish
from qrlora_deploy.models.capacity import check_segments
from qrlora_deploy.tasks.answer_rows import answer_rows
from qrlora_deploy.tasks.base import IGNORED
from qrlora_deploy.training.fleet.customers import Customer
from qrlora_deploy.training.label_likelihoods import LabelRows, label_rows
from qrlora_deploy.training.rows import build_rows

IDS, LABELS = "input_ids", "labels"
ROWS_AT_ONCE = 4096
"""Rows that the tokenizer gets together; it shares them out among the cores without holding up Python."""


@dataclass(frozen=True)
class TokenRows:
    """The rows of a customer, the held-out ones last, one after another.

    Attributes:
        values: `[tokens]` int32 by name of each input of the model that has one value a token.
        lengths: `[rows]` int64, none of them 0.
        held_out: how many rows are held out, of prompts with answers; a row of data may give several, or none.
        remark: what a user may not expect of them.
        label_rows: held-out prompts with every label, where answers are labels.
    """

    values: dict[str, np.ndarray]
    lengths: np.ndarray
    held_out: int = 0
    remark: str = ""
    label_rows: LabelRows | None = None


class RowEncoder:
    """Makes tokens as `build_rows` does.

    Most of the time of a tokenizer's call goes into lists that a fleet does not need. So the Rust
    tokenizer inside is asked itself where it gives the same for the first customer.

    Args:
        tokenizer: of the base; nobody else may use it meanwhile.
        names: of the model's inputs that have one value a token.
        max_length: tokens of a row.
        segments: that the base tells apart, as `capacity.segment_rows` has it.
        written: whether rows are prompts with answers; then `labels` go with the tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        names: Sequence[str],
        max_length: int,
        segments: int | None = None,
        written: bool = False,
    ) -> None:
        self.tokenizer, self.names, self.max_length = tokenizer, tuple(names), max_length
        self.written = written
        self.segments = segments
        self._same: dict[bool, bool] = {}

    def __call__(self, customers: Sequence[Customer]) -> list[TokenRows | InputError]:
        """Their rows, or what is wrong with them."""
        if self.written:
            return [self._answers(customer) for customer in customers]
        try:
            return self._encode(customers)
        except (TypeError, ValueError) as error:
            if len(customers) > 1:
                return [part for customer in customers for part in self([customer])]
            return [InputError(f"{customers[0].train.name}: the tokenizer cannot read the texts: {first_line(error)}")]

    def _encode(self, customers: Sequence[Customer]) -> list[TokenRows | InputError]:
        found: list[TokenRows | InputError] = []
        fast = [self._is_same(customer) for customer in customers]
        quick = self._quick([customer for customer, able in zip(customers, fast, strict=True) if able])
        for customer, able in zip(customers, fast, strict=True):
            rows = next(quick) if able else self._slow(customer)
            found.append(self._problem(customer, rows) or rows)
        return found

    def _answers(self, customer: Customer) -> TokenRows | InputError:
        try:
            made = [answer_rows(self.tokenizer, part, self.max_length) for part in _parts(customer)]
            labelled = label_rows(self.tokenizer, customer.train, customer.evaluation, self.max_length)
        except InputError as error:
            return error
        rows = [row for part in made for row in part.rows]
        flat = _flat({name: [row[name] for row in rows] for name in (IDS, LABELS)})
        held_out = len(made[1].rows) if customer.evaluation else 0
        return TokenRows(flat.values, flat.lengths, held_out, made[0].remark(self.max_length), labelled)

    def _problem(self, customer: Customer, rows: TokenRows) -> InputError | None:
        empty = np.flatnonzero(rows.lengths == 0)
        if len(empty):
            return InputError(_without_text(customer, int(empty[0])))
        try:
            check_segments(customer.train.name, self.segments, rows.values.get("token_type_ids", np.zeros(0)))
        except InputError as error:
            return error
        return None

    def _quick(self, customers: Sequence[Customer]) -> Iterator[TokenRows]:
        texts = [text for customer in customers for part in _parts(customer) for text in self._inputs(part)]
        encodings = iter(self.tokenizer.backend_tokenizer.encode_batch(texts) if texts else [])
        for customer in customers:
            own = [next(encodings) for examples in _parts(customer) for _ in range(len(examples))]
            values = {IDS: [encoding.ids for encoding in own]}
            if "token_type_ids" in self.names:
                values["token_type_ids"] = [encoding.type_ids for encoding in own]
            yield _flat(values)

    def _inputs(self, examples: Examples) -> Sequence[str | tuple[str, str]]:
        texts, pairs = cut_texts(self.tokenizer, examples.texts, examples.pairs, self.max_length, examples.name)
        return texts if pairs is None else list(zip(texts, pairs, strict=True))

    def _slow(self, customer: Customer) -> TokenRows:
        rows = [
            row
            for examples in _parts(customer)
            for row in build_rows(self.tokenizer, examples, [0] * len(examples), self.max_length)
        ]
        return _flat({name: [row[name] for row in rows] for name in self.names})

    def _is_same(self, customer: Customer) -> bool:
        """Whether the Rust tokenizer gives the same; it is set up by the call that it is compared with."""
        pairs = customer.train.pairs is not None
        if pairs not in self._same:
            expected = self._slow(customer)
            able = getattr(self.tokenizer, "is_fast", False) and set(self.names) <= {IDS, "token_type_ids"}
            found = next(self._quick([customer])) if able else None
            self._same[pairs] = found is not None and _equal(found, expected)
        return self._same[pairs]


class TokensAhead:
    """The rows of customers in their order; up to `ahead` of them are made before they are asked for.

    Nothing is made before the first is asked for: whoever asks must be able to `close` it by then.

    Args:
        encoder: makes them.
        customers: in the order in which they will be asked for.
        ahead: how many may wait.
    """

    def __init__(self, encoder: RowEncoder, customers: Sequence[Customer], ahead: int) -> None:
        self.encoder, self.customers, self.ahead = encoder, customers, ahead
        self._thread = ThreadPoolExecutor(1, "tokens")
        self._pending: deque[Future[list[TokenRows | InputError]]] = deque()
        self._ready: deque[TokenRows | InputError] = deque()
        self._begun = self._taken = 0

    def take(self) -> TokenRows | InputError:
        """The rows of the next customer, or what is wrong with them.

        Raises:
            IndexError: there is none.
        """
        self._begin()
        if not self._ready:
            self._ready.extend(self._pending.popleft().result())
        self._taken += 1
        self._begin()
        return self._ready.popleft()

    def close(self) -> None:
        """End the thread, however many signals come meanwhile; what it has not begun is not made.

        Raises:
            KeyboardInterrupt: one came.
        """
        finish(lambda: self._thread.shutdown(cancel_futures=True))

    def _begin(self) -> None:
        while self._begun < min(len(self.customers), self._taken + self.ahead):
            start, rows = self._begun, 0
            while self._begun < len(self.customers) and rows < ROWS_AT_ONCE:
                rows += sum(len(examples) for examples in _parts(self.customers[self._begun]))
                self._begun += 1
            self._pending.append(self._thread.submit(self.encoder, self.customers[start : self._begun]))


def _without_text(customer: Customer, row: int) -> str:
    """What is said of a row from 0, the held-out ones last, that gives no token."""
    part, number = customer.train, row + 1
    if customer.evaluation is not None and row >= len(part):
        part, number = customer.evaluation, number - len(part)
    return f"{row_of(part.name, number)} has no text that the tokenizer knows"


def _parts(customer: Customer) -> list[Examples]:
    return [customer.train, *([customer.evaluation] if customer.evaluation else [])]


def _flat(values: dict[str, list[list[int]]]) -> TokenRows:
    lengths = np.array([len(row) for row in values[IDS]], dtype=np.int64)
    total = int(lengths.sum())
    return TokenRows(
        {name: np.fromiter(chain.from_iterable(rows), np.int32, total) for name, rows in values.items()},
        lengths,
    )


def _equal(one: TokenRows, two: TokenRows) -> bool:
    return np.array_equal(one.lengths, two.lengths) and all(
        np.array_equal(one.values[name], values) for name, values in two.values.items()
    )


def answer_counts(rows: TokenRows) -> np.ndarray:
    """`[rows]` int64: how many tokens of each row are learned; nothing foretells its first one."""
    starts = np.cumsum(rows.lengths) - rows.lengths
    learned = rows.values[LABELS] != IGNORED
    learned[starts] = False
    return np.add.reduceat(learned.astype(np.int64), starts)
