"""What the benchmark of decoders' learning rates makes of rows and runs, and a run of each method on a tiny decoder."""

import json
from pathlib import Path

from benchmarks.decoder_rate.page import table
from benchmarks.decoder_rate.plan import Planned, planned
from benchmarks.decoder_rate.runs import run
from benchmarks.decoder_rate.tasks import HELD_OUT_ROWS, TRAIN_ROWS, Task, banking, read_task
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.training.settings import default_rate
from tests.tiny_decoder import save_decoder


def test_rows_are_prompts_with_words_of_labels(tmp_path: Path) -> None:
    task = banking()
    assert (len(task.train), len(task.held_out)) == (TRAIN_ROWS, HELD_OUT_ROWS)
    assert all(row[0].content.endswith("\nIntent:") and "_" not in row[1].content for row in task.train.turns or ())
    rows = [{"prompt": str(number), "completion": " x"} for number in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    named = read_task(f"any={tmp_path}/a.jsonl,{tmp_path}/a.jsonl")
    assert (named.name, len(named.train), len(named.held_out)) == ("any", 400, HELD_OUT_ROWS)
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n"a fine film \t1\nbleak \t0\n')
    turns = read_task(f"SST-2={tmp_path}/a.tsv,{tmp_path}/a.tsv").train.turns or ()
    assert {(prompt.content, answer.content) for prompt, answer in turns} == {
        ('Review: "a fine film\nSentiment:', " positive"),
        ("Review: bleak\nSentiment:", " negative"),
    }


def test_both_methods_train_at_the_rates_that_are_planned(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_decoder(tmp_path / "base")))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton(), ["q"]), EnergyShare(0.5))
    task = banking()
    small = Task("banking", task.train.take(range(40)), task.held_out.take(range(2)))
    ours = Planned("banking", "coefficients", "query and value", 1, factor=3.0)
    found = run(ours, small, checkpoint, basis, "cpu")
    assert ours.is_done([found]) and found["learning_rate"] == default_rate(basis.total_rank, 3.0)
    assert found["steps"] == 6 and found["metrics"]["nll"] != found["baseline"]["nll"]
    lora = Planned("banking", "lora", "query and value", 1, rate=3e-2)
    other = run(lora, small, checkpoint, basis, "cpu")
    assert other["steps"] == 6 and other["trained"] == 2 * 8 * (32 + 32)
    assert other["metrics"]["nll"] < found["baseline"]["nll"]


def test_all_runs_of_a_seed_come_before_those_of_the_next() -> None:
    runs = planned(["a", "b"], ["all linear layers", "query and value"], [0, 1])
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert len(set(runs)) == len(runs) == 2 * 2 * 2 * (5 + 2)
    assert not runs[0].is_done([vars(run) for run in runs[1:]])


def test_a_table_has_mean_and_spread_over_seeds() -> None:
    entry = {"task": "banking", "setup": "query and value", "trained": 4703, "method": "coefficients", "rate": None}
    scores = ((1.0, 0, 0.25), (1.0, 1, 0.75), (3.0, 0, 1.0))
    runs = [
        entry | {"factor": factor, "seed": seed, "metrics": {"exact_match": x, "nll": 0.5}}
        for factor, seed, x in scores
    ]
    assert table(runs).splitlines()[:3] == [
        "| task | layers | coefficients | seeds | 1 x | 2 x | 3 x | 6 x | 10 x |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| banking | query and value | 4,703 (default of classifiers 0.0402) | 2 "
        "| 50.0 ± 25.0 (0.500) | – | 100.0 ± 0.0 (0.500) | – | – |",
    ]
