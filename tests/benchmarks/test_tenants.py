"""The benchmark of shared bases: nobody is judged on whom a basis was chosen, and the table says what was run."""

from pathlib import Path

import pytest

from benchmarks.tenants.customers import DOMAINS, Data, Split
from benchmarks.tenants.methods import METHODS
from benchmarks.tenants.plan import BASES, START, Place, Run, make_plan, undone
from benchmarks.tenants.report import render


@pytest.mark.parametrize("number", range(5))
def test_nobody_is_judged_on_whom_a_basis_was_chosen(number: int) -> None:
    split = Split(number)
    assert len(split.chosen_on) == 6 and len(split.judged_on) == 9
    assert not set(split.chosen_on) & set(split.judged_on)
    assert set(DOMAINS) < {*split.chosen_on, *split.judged_on}


def test_pooled_labels_are_each_customer_s_own(tmp_path: Path) -> None:
    for customer in (*(f"clinc150/{domain}" for domain in DOMAINS), "banking77"):
        (tmp_path / customer).mkdir(parents=True)
        for part in ("train", "test"):
            (tmp_path / customer / f"{part}.tsv").write_text("text\tlabel\na\tyes\nb\tno\nc\tyes\n", "utf-8")
    pooled = Data(tmp_path, 2, 1).pooled(Split(0))
    labels = [set(part.labels) for part in pooled]
    assert [len(part) for part in pooled] == [2] * 6 and len(set.union(*labels)) == sum(map(len, labels))


def test_what_others_need_is_made_before_them(tmp_path: Path) -> None:
    plan = make_plan(["m"], [0, 1], list(METHODS))
    place = Place(tmp_path, tmp_path)
    made = {place.tokens(run) for run in plan}
    for run in plan:
        assert set(place.needs(run)) <= made
        made |= set(place.makes(run))
    assert len({run.key for run in plan}) == len(plan) == 1 + 2 * (10 + 1 + 9 * len(METHODS))


def test_what_needs_a_failed_run_is_left_out(tmp_path: Path) -> None:
    plan = make_plan(["m"], [0], ["even", "lora"])
    first = plan[0]
    left = undone(plan, Place(tmp_path, tmp_path), set(), {first.key})
    assert {run.method for run in left} == {START, "lora"} and BASES not in {run.method for run in left}
    assert Run("m", 0, "pool", START) in left


def test_the_table_compares_gains_with_lora_s() -> None:
    records = []
    for method, score in ((START, 0.5), ("even", 0.59), ("lora", 0.6)):
        for number in (0, 1):
            for customer in Split(number).judged_on:
                run = Run("m", number, customer, method)
                facts = {"accuracy": score, "trainable_parameters": 640, "learning_rate": 0.03}
                records.append(
                    {"key": run.key, "model": "m", "split": number, "customer": customer, "method": method} | facts
                )
    settings = {"epochs": 3, "batch_size": 32, "train_rows": 9, "max_length": 8, "bf16": False}
    for record in records:
        record |= {"settings": settings, "device": "cpu", "versions": {}}
    lines = render(records).splitlines()
    even = next(line for line in lines if line.startswith("| even 640"))
    assert "| 59.0 ± 0.0 | 9.0 ± 0.0 | +9.0 | 90.0 ± 0.0 % |" in even
    partial = render(records[:-1]).splitlines()
    assert next(line for line in partial if line.startswith("| LoRA")).startswith("| LoRA, r = 8, q and v (PEFT) (1) |")
