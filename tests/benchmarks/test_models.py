"""The page of families: it is of the families that the benchmark runs, and tells what was found."""

import json
from pathlib import Path

import pytest

from benchmarks.models.families import FAMILIES
from benchmarks.models.page import write_page
from benchmarks.models.results import read_results, result_file
from benchmarks.models.whole import STEPS, try_family

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "models"
BY_NAME = {family.name: family for family in FAMILIES}


def test_the_page_is_made_of_the_results_and_names_every_family(tmp_path: Path) -> None:
    results = read_results(RESULTS)
    write_page(tmp_path / "models.md", results)
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == (tmp_path / "models.md").read_text(encoding="utf-8")
    ends = " ".join(line for line in page.splitlines() if line.startswith("Not "))
    assert all(f"| {family.name} |" in page or f" {family.name}" in ends for family in FAMILIES)


def test_no_family_fails_after_it_was_trained() -> None:
    late = ("merge", "merged", "switchable")
    for result in read_results(RESULTS):
        assert not result.get("fault"), result["family"]
        assert not set(result.get("refused", {})) & set(late), result["family"]


@pytest.mark.parametrize("name", ["T5", "GPT-2 without a padding token", "BERT, quantised", "CLIP"])
def test_a_refusal_is_found_again(name: str, tmp_path: Path) -> None:
    found = try_family(BY_NAME[name], tmp_path)
    known = json.loads(result_file(RESULTS, BY_NAME[name]).read_text(encoding="utf-8"))
    assert found["refused"].keys() == known["refused"].keys() == {"factorize"}
    assert not found["fault"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "splits"), [("BERT", True), ("Qwen2, window", False)])
def test_a_family_works_the_whole_way(name: str, splits: bool, tmp_path: Path) -> None:
    found = try_family(BY_NAME[name], tmp_path)
    facts = found["facts"]
    assert not found["fault"] and not set(found["refused"]) - {"padding-free"}
    # Ten times what was measured; another customer's answer is off by the effect.
    assert facts["merge"] == 0 and max(facts["merged"], facts["switchable"]) < 1e-5 < facts["effect"] / 10
    assert facts["fp16"] < facts["effect"] / 5
    assert facts["fleet"] < 1e-3
    cached = facts["trunk cache"]
    assert cached < 1e-3 if splits else cached.startswith("off: Qwen2ForSequenceClassification cannot be split")
    assert set(facts) | set(found["refused"]) >= set(STEPS)
