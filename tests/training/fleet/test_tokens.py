"""Tokens made ahead: those of the library, in the order of the customers, and what is wrong with some."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tokenizers

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.training.fleet import tokens
from qrlora_deploy.training.fleet.customers import Customer
from qrlora_deploy.training.fleet.tokens import RowEncoder, TokenRows, TokensAhead
from qrlora_deploy.training.outputs import Outputs
from qrlora_deploy.training.rows import build_rows
from qrlora_deploy.training.settings import TrainSettings
from tests.tiny import SENTENCES, build_tokenizer

NAMES = ["input_ids", "token_type_ids"]
OUTPUTS = Outputs(Classification(), ("a", "b"), new=False)


def customer_of(name: str, texts: list[str], held_out: list[str] | None = None, pairs: bool = False) -> Customer:
    parts = [
        Examples(rows, list(reversed(rows)) if pairs else None, ["a"] * len(rows), name)
        for rows in (texts, held_out or [])
    ]
    targets = ([0] * len(texts), [0] * len(held_out or []))
    return Customer(name, parts[0], parts[1] if held_out else None, OUTPUTS, *targets, TrainSettings())


def check_tokens(found: TokenRows | InputError, customer: Customer, tokenizer: Any, length: int) -> None:
    assert isinstance(found, TokenRows)
    rows = [
        row
        for part in (customer.train, customer.evaluation)
        if part
        for row in build_rows(tokenizer, part, [0] * len(part), length)
    ]
    assert found.lengths.tolist() == [len(row["input_ids"]) for row in rows]
    for name in NAMES:
        np.testing.assert_array_equal(found.values[name], [value for row in rows for value in row[name]])


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_tokens_are_those_of_the_library(pairs: bool, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    customers = [
        customer_of("a", SENTENCES[:3], SENTENCES[3:5], pairs),
        customer_of("b", [" ".join(SENTENCES), "rice"], None, pairs),
        customer_of("c", SENTENCES[5:6], SENTENCES[:1], pairs),
    ]
    encoder = RowEncoder(build_tokenizer(), NAMES, 12)
    asked: list[int] = []
    slow = encoder._slow
    if quick:
        monkeypatch.setattr(encoder, "_slow", lambda customer: asked.append(1) or slow(customer))
    else:
        monkeypatch.setattr(encoder, "_is_same", lambda _: False)
    found = encoder(customers)
    assert len(asked) == int(quick), "the library is asked about the first customer"
    for rows, customer in zip(found, customers, strict=True):
        check_tokens(rows, customer, build_tokenizer(), 12)


def test_customers_without_a_token_or_with_broken_text_stop_no_other() -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A", pair="$A $B")
    customers = [
        customer_of("good", SENTENCES[:2]),
        customer_of("empty", ["rice", " "]),
        customer_of("broken", ["\ud800"]),
        customer_of("last", SENTENCES[2:3]),
    ]
    found = RowEncoder(tokenizer, ["input_ids"], 12)(customers)
    assert isinstance(found[0], TokenRows) and isinstance(found[3], TokenRows)
    assert str(found[1]) == "empty: row 2 has no text that the tokenizer knows"
    assert str(found[2]).startswith("broken: the tokenizer cannot read the texts")


def test_customers_come_in_their_order_and_few_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "ROWS_AT_ONCE", 5)
    customers = [customer_of(str(number), SENTENCES[: 1 + number % 4]) for number in range(20)]
    ahead = TokensAhead(RowEncoder(build_tokenizer(), NAMES, 12), customers, 4)
    begun = []
    for customer in customers:
        begun.append(ahead._begun)
        check_tokens(ahead.take(), customer, build_tokenizer(), 12)
    assert begun[0] < 10 and ahead._begun == 20
    with pytest.raises(IndexError):
        ahead.take()
    ahead.close()


def test_nothing_is_made_before_the_first_is_asked_for() -> None:
    """Whoever asks is by then inside the block that closes, whenever a signal comes."""
    asked: list[int] = []

    def encode(customers: Sequence[Customer]) -> list[TokenRows | InputError]:
        asked.append(len(customers))
        return [InputError(customer.name) for customer in customers]

    ahead = TokensAhead(encode, [customer_of("a", SENTENCES[:1])], 4)  # type: ignore[arg-type]
    ahead.close()
    assert asked == [] and ahead._begun == 0


def test_a_customer_with_pairs_on_a_base_of_one_segment_stops_no_other() -> None:
    customers = [customer_of("single", SENTENCES[:2]), customer_of("paired", SENTENCES[:2], None, True)]
    found = RowEncoder(build_tokenizer(), NAMES, 12, segments=1)(customers)
    assert isinstance(found[0], TokenRows)
    assert "makes segment 1" in str(found[1]) and "have 1 rows" in str(found[1])
