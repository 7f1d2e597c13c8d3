"""Long texts in training have the tokens that they have in serving: those of the whole text."""

import pytest

from qrlora_deploy.data.cutting import cut_texts
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.training.fleet.customers import Customer
from qrlora_deploy.training.fleet.tokens import RowEncoder
from qrlora_deploy.training.rows import build_rows
from qrlora_deploy.training.settings import TrainSettings
from tests.tiny import build_tokenizer

TEXTS = ["play some music " * 400, "hello", " " * 20_000 + "rain", "a" * 20_000 + " rain"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_those_of_the_whole_texts(side: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.truncation_side = side
    expected = tokenizer(TEXTS, truncation=True, max_length=16)
    rows = build_rows(tokenizer, Examples(TEXTS, None, ["a"] * 4, "data.tsv"), [0] * 4, 16)
    assert [row["input_ids"] for row in rows] == expected["input_ids"]
    cut, _ = cut_texts(tokenizer, TEXTS, None, 16)
    assert len(cut[0]) < 2000


def test_rows_of_a_fleet_are_cut_alike() -> None:
    tokenizer = build_tokenizer()
    examples = Examples(TEXTS, None, ["a"] * 4, "data.tsv")
    expected = [ids for row in tokenizer(TEXTS, truncation=True, max_length=16)["input_ids"] for ids in row]
    encoder = RowEncoder(tokenizer, ("input_ids",), 16)
    for _ in range(2):
        (rows,) = encoder([Customer("acme", examples, None, 1, [0] * 4, [], TrainSettings())])
        assert not isinstance(rows, InputError) and rows.values["input_ids"].tolist() == expected


def test_a_row_that_cannot_be_cut_is_named() -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(InputError, match=r"data\.tsv: text 2: 200000 characters"):
        cut_texts(tokenizer, ["a", "\u4f60b" * 100_000], None, 16, "data.tsv")
