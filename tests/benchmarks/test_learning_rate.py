"""What the benchmarks of learning rates and dropout make of their rows and runs; the runs themselves take minutes."""

from pathlib import Path

import pytest

from benchmarks.dropout import summary
from benchmarks.learning_rate import TRAIN_ROWS, WARM_ROWS, read_task, table


def test_rows_of_the_warm_up_are_not_trained_on_again(tmp_path: Path) -> None:
    for part, count in (("train", 1500), ("dev", 700)):
        rows = [f"text {index} of {part}\t{index % 2}" for index in range(count)]
        (tmp_path / f"{part}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    task = read_task(f"any={tmp_path}/train.tsv,{tmp_path}/dev.tsv")
    assert (len(task.warm), len(task.train), len(task.held_out)) == (WARM_ROWS, TRAIN_ROWS, 500)
    assert not set(task.warm.texts) & set(task.train.texts)
    assert all("of dev" in text for text in task.held_out.texts)
    assert task.train.labels == [str(int(text.split()[1]) % 2) for text in task.train.texts]


def test_a_table_has_a_row_for_each_number_of_coefficients() -> None:
    run = {"task": "SST-2", "setup": "all", "coefficients": 3047, "start": 0.75}
    lines = table([run | {"factor": 1.0, "accuracy": 0.8}, run | {"factor": 3.0, "accuracy": 0.5}]).splitlines()
    assert lines == [
        "| task | coefficients | default rate | start | 0.3 x | 1 x | 3 x |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| SST-2 | 3,047 | 0.05 | 0.750 | – | 0.800 | 0.500 |",
    ]


def test_dropout_is_summed_up_over_seeds() -> None:
    run = {"setup": "all linear layers", "customer": "banking"}
    runs = [run | {"dropout": drops, "accuracy": 0.8 + 0.02 * seed} for drops in (False, True) for seed in range(2)]
    (line,) = summary(runs[:3])
    assert line["without"] == pytest.approx(0.81) and line["without_deviation"] == pytest.approx(0.0141, abs=1e-4)
    assert line["with"] == pytest.approx(0.8) and line["with_deviation"] == 0.0
