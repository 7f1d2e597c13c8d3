"""The packaged data: complete, small, and with no held-out text among what is trained on."""

import subprocess
import sys
from collections import Counter

import pytest

from qrlora_deploy.data import sample as data

INTENTS, OWN_INTENTS, ROWS_PER_INTENT, HELD_OUT_PER_INTENT = 150, 15, 10, 30


def test_general_sample_has_ten_rows_of_every_intent() -> None:
    counts = Counter(data.general_examples().labels)
    assert len(counts) == INTENTS
    assert set(counts.values()) == {ROWS_PER_INTENT}


@pytest.mark.parametrize("customer", data.CUSTOMERS)
def test_customer_has_its_own_intents_in_both_parts(customer: str) -> None:
    train, held_out = data.train_examples(customer), data.held_out_examples(customer)
    counts = Counter(held_out.labels)
    assert len(counts) == OWN_INTENTS
    assert set(counts.values()) == {HELD_OUT_PER_INTENT}
    assert set(train.labels) == set(counts) <= set(data.general_examples().labels)
    assert len(train) >= 1490


def test_customers_share_no_intent() -> None:
    labels = [set(data.train_examples(customer).labels) for customer in data.CUSTOMERS]
    assert len(set.union(*labels)) == sum(map(len, labels))


def test_no_held_out_text_is_trained_on() -> None:
    trained = set(data.general_examples().texts)
    held_out: set[str] = set()
    for customer in data.CUSTOMERS:
        trained |= set(data.train_examples(customer).texts)
        held_out |= set(data.held_out_examples(customer).texts)
    assert not trained & held_out


def test_data_is_small_and_carries_its_licence() -> None:
    size = sum(path.stat().st_size for path in data.FOLDER.iterdir())
    assert 350_000 < size < 500_000
    assert "Attribution 3.0" in (data.FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert "github.com/clinc/oos-eval" in (data.FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")


def test_folder_holds_nothing_but_the_data() -> None:
    expected = {data.GENERAL, "LICENSE", "ATTRIBUTION.md"}
    for customer in data.CUSTOMERS:
        expected |= {data.train_file(customer).name, data.held_out_file(customer).name}
    assert {path.name for path in data.FOLDER.iterdir()} == expected


def test_sample_texts_are_many_different_and_of_different_lengths() -> None:
    texts = data.sample_texts()
    lengths = [len(text) for text in texts]
    assert len(set(texts)) == len(texts) == data.SAMPLES
    assert min(lengths) < 10 and max(lengths) > 80
    # The parity check takes the first few: they must not all have one length.
    assert max(lengths[:8]) > 5 * min(lengths[:8])
    assert texts == data.sample_texts()


def test_sample_texts_import_no_torch() -> None:
    code = (
        "import sys; from qrlora_deploy.data.sample import sample_texts; sample_texts(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
