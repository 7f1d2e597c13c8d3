"""The two warm-ups of `benchmarks/regression_start.py` differ in the first bias alone."""

from pathlib import Path

import pytest

from benchmarks import regression_start
from benchmarks.glue.starts import Models
from benchmarks.glue.tasks import read_tokens, write_tokens
from qrlora_deploy.models.checkpoint import open_checkpoint
from tests.tiny import SENTENCES


def test_a_warm_up_is_looked_at_along_the_way(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression_start, "STEPS", 4)
    monkeypatch.setattr(regression_start, "EVERY", 2)
    (tmp_path / "STS-B").mkdir()
    for part in ("train", "dev"):
        rows = [f"{SENTENCES[index % 6]}\t{SENTENCES[index % 5]}\t{index % 4 + 1}.5" for index in range(40)]
        text = "\n".join(["sentence1\tsentence2\tlabel", *rows]) + "\n"
        (tmp_path / "STS-B" / f"{part}.tsv").write_text(text)
    checkpoint = open_checkpoint(str(tiny_base))
    write_tokens(regression_start.TASK, str(tmp_path), checkpoint, tmp_path / "tokens", 32)
    parts, _ = read_tokens(tmp_path / "tokens", "cpu")
    models = Models(checkpoint, "cpu")
    zero, mean = (
        regression_start.warm_up(models.fresh(regression_start.TASK, 1, 0, bias), parts, 0) for bias in (0.0, 3.0)
    )
    assert [point["step"] for point in zero] == [0, 2, 4]
    # The bias moves every answer by itself, and nothing else of the start.
    assert mean[0]["mean"] - zero[0]["mean"] == pytest.approx(3.0, abs=2e-3)
    assert [mean[0][name] for name in ("cosine", "spread")] == [zero[0][name] for name in ("cosine", "spread")]
    assert zero[1]["loss"] > mean[1]["loss"]
