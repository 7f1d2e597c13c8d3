"""The benchmark of decoders: what it checks before it times, and what it makes of its record."""

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.decoding.aims import lines_of, table
from benchmarks.decoding.batching import lengths
from benchmarks.decoding.bench import Bench, Settings, prepare
from benchmarks.decoding.checking import CheckError, check
from benchmarks.decoding.peers import Generate, Static


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("decoding")
    return prepare(folder, "tiny", Settings("cpu", 1, (1, 3), 9, 6, (), None))


def test_graphs_are_held_against_pytorch_with_customers_in_the_rows(bench: Bench) -> None:
    for name in ("qv", "all"):
        assert bench.checks[name]["error"] < 1e-4
        assert bench.checks[name]["customers_effect"] > 0.5
    assert bench.checks["none"]["customers_effect"] == 0


def test_a_graph_with_other_customers_is_refused(bench: Bench) -> None:
    made = bench.graphs["qv"]
    others = np.random.default_rng(0).standard_normal((3, made.basis.total_rank), dtype=np.float32)
    with pytest.raises(CheckError, match="qv: logits are"):
        check(made, bench.sessions["qv"], bench.model, others, "cpu", "fp32", 9, 1)


def test_every_contender_writes_what_generate_writes(bench: Bench) -> None:
    ids = bench.ids(3)
    expected = Generate(bench.model, "cpu", 6).tokens(ids)
    assert torch.equal(Static(bench.model, "cpu", 3, 9, 6, compiled=False).tokens(ids), expected)
    writer = bench.writer("none", 3)
    writer.read(ids)
    found = [writer.chosen.clone()]
    for _ in range(5):
        writer.write()
        found.append(writer.chosen.clone())
    assert torch.equal(torch.cat(found, dim=1), expected)


def test_figures_come_from_the_medians_of_a_record() -> None:
    def times(milliseconds: float) -> dict[str, Any]:
        return {"token_ms": {"p50": milliseconds}}

    steps = {"1": {"contenders": {"none": times(1.0), "qv": times(1.08), "torch.compile, static cache": times(1.62)}}}
    record = {"shapes": {"llama-3.2-1b": {"layers": 16, "floor_ms": 0.8, "steps": steps}}}
    found = {line.what: line for line in lines_of(record) if line.value is not None}
    assert {what: round(line.value or 0, 6) for what, line in found.items()} == {
        "1B, no branches, by the bandwidth floor, batch 1": 1.25,
        "1B, q and v, us a layer over none, batch 1": 5.0,
        "torch.compile by q and v, 1B, batch 1": 1.5,
    }
    assert all(line.met for line in found.values())
    assert table(list(found.values())).count("\n") == 4


def test_lengths_are_within_their_bounds_and_have_the_mean() -> None:
    drawn = lengths(161, 20_000, 10**6, np.random.default_rng(0))
    assert drawn.min() >= 1
    assert abs(drawn.mean() / 161 - 1) < 0.05
    assert lengths(161, 1000, 100, np.random.default_rng(0)).max() == 100
