"""What the benchmark of decoders' learning rates makes of rows and runs, and one run on a tiny decoder."""

import json
from pathlib import Path

from benchmarks.decoder_rate import HELD_OUT_ROWS, TRAIN_ROWS, Task, banking, read_task, run, table
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
    rows = [{"prompt": str(number), "completion": " x"} for number in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    named = read_task(f"any={tmp_path}/a.jsonl,{tmp_path}/a.jsonl")
    assert (named.name, len(named.train), len(named.held_out)) == ("any", 200, HELD_OUT_ROWS)


def test_a_run_is_at_its_multiple_of_the_default_rate(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_decoder(tmp_path / "base")))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton(), ["q"]), EnergyShare(0.5))
    task = banking()
    small = Task("banking", task.train.take(range(4)), task.held_out.take(range(2)))
    found = run(small, "query and value", 3.0, 1, checkpoint, basis)
    assert found["learning_rate"] == default_rate(basis.total_rank, 3.0) and found["seed"] == 1
    assert found["steps"] == 2 and found["metrics"]["nll"] != found["baseline"]["nll"]


def test_a_table_has_mean_and_spread_over_seeds() -> None:
    entry = {"task": "banking", "coefficients": 4703}
    scores = ((1.0, 0, 0.25), (1.0, 1, 0.75), (3.0, 0, 1.0))
    runs = [entry | {"factor": factor, "seed": seed, "metrics": {"exact_match": x}} for factor, seed, x in scores]
    assert table(runs).splitlines() == [
        "| task | coefficients | default rate | seeds | 1 x | 3 x | 6 x | 10 x |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| banking | 4,703 | 0.0402 | 2 | 50.0 ± 25.0 | 100.0 ± 0.0 | – | – |",
    ]
