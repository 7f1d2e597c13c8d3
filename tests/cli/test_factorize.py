"""`factorize` with a budget, as a user meets it."""

from pathlib import Path

import pytest

from tests.cli.running import run_here, succeed_here


def test_a_budget_is_spread_over_all_layers_and_shown(tiny_base: Path, tmp_path: Path) -> None:
    made = succeed_here(
        ["factorize", tiny_base, "--budget", 3, "--spread", "energy", "-o", tmp_path / "basis.safetensors"], tmp_path
    )
    assert made["total_rank"] == 3 == sum(target["rank"] for target in made["targets"])
    kept = {target["name"] for target in made["targets"]}
    assert made["without_directions"] and not kept & set(made["without_directions"])
    shown = succeed_here(["inspect", tmp_path / "basis.safetensors"], tmp_path)
    assert shown["rule"] == "3 directions, by energy" and shown["total_rank"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", 9, "--tau", 0.5), "--tau, --rank and --budget exclude each other"),
        (("--spread", "even"), "--spread needs --budget"),
        (("--budget", 10**6), "--budget 1000000 is more than the chosen layers have; give "),
    ],
)
def test_a_budget_that_cannot_be_is_refused(
    tiny_base: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    shown = run_here("factorize", tiny_base, "-o", "basis.safetensors", *options, cwd=tmp_path)
    assert shown.code == 2 and message in shown.err
    assert not (tmp_path / "basis.safetensors").exists()
