"""`bench` on the command line: what it writes, what it prints, and when it ends with which code."""

import tomllib
from pathlib import Path

import pytest

from qrlora_deploy.bench.report import read_report
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from tests.cli.running import run_here
from tests.tiny import LABELS, SENTENCES

SHORT = "bench bundle --customers customers --batch 1 --length 8 --threads 1 --seconds 0.4 --samples 6 -o report"
LOOSE = """
allow_unstable = true
[parity]
max_abs_error = 1.0
[size]
max_bundle_bytes = 1000000000
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switchable: Path, tiny_customer: Coefficients) -> Path:
    """The current folder: a bundle, a customer, its labelled file."""
    (tmp_path / "bundle").symlink_to(switchable)
    (tmp_path / "customers").mkdir()
    write_coefficients(tiny_customer, tmp_path / "customers" / "acme.safetensors")
    rows = [f"{text}\t{LABELS[0]}" for text in SENTENCES]
    (tmp_path / "acme.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_good_bundle_passes(place: Path) -> None:
    (place / "gate.toml").write_text(LOOSE + '[accuracy]\nmin = 0.0\n[accuracy.data]\nacme = "acme.tsv"\n')
    ran = run_here(*SHORT.split(), "--gate", "gate.toml", "--json", cwd=place)
    assert ran.code == 0
    printed, report = ran.json, read_report(place / "report" / "report.json")
    assert printed["gate"]["passed"] and printed["gate"]["customers"] == {"acme": True}
    assert "samples" not in printed["measurements"][0] and report.measurements[0].samples
    assert report.accuracy[0].rows == len(SENTENCES)
    markdown = (place / "report" / "report.md").read_text()
    assert markdown.startswith("## Benchmark: PASSED: 3 checks of gate.toml\n")
    assert "<svg" in (place / "report" / "report.html").read_text()


def test_a_broken_rule_ends_with_1_and_names_it(place: Path) -> None:
    (place / "gate.toml").write_text("[size]\nmax_bundle_bytes = 1000\n")
    ran = run_here(*SHORT.split(), "--scenario", "single-stream", "--gate", "gate.toml", cwd=place)
    assert ran.code == 1 and ran.out.startswith("FAILED: 1 of 1 check of gate.toml")
    assert (
        ran.err.startswith("Error: the gate gate.toml failed: switchable: bundle bytes ")
        and "> 1000" in ran.err
        and len(ran.err.splitlines()) == 1
    )


def test_the_example_is_a_gate(place: Path) -> None:
    ran = run_here("bench", "--gate-example", cwd=place)
    assert ran.code == 0 and "max_ratio" in tomllib.loads(ran.out)["latency"][1]


def test_refused_in_one_line(place: Path) -> None:
    (place / "gate.toml").write_text("[capacity]\nmin_requests_per_s = 1\n")
    (place / "ratio.toml").write_text("[[latency]]\nmax_ratio = 1.1\n")
    (place / "right.toml").write_text("[accuracy]\nmin = 0.5\n")
    (place / "gone.toml").write_text('[accuracy]\nmin = 0.5\n[accuracy.data]\nacme = "gone.tsv"\n')
    (place / "typo.toml").write_text("[size]\nmax_bundle = 1\n")
    for command, part in (
        ("bench", "Missing argument"),
        ("bench nowhere", "nowhere"),
        ("bench customers", "customers is not a bundle"),
        ("bench bundle --length 65", "takes at most 64 tokens"),
        ("bench bundle --peer peft", "--peer peft needs --base"),
        ("bench bundle --cuda-graph on", "--cuda-graph on needs --provider cuda"),
        ("bench bundle --gate gate.toml", "add --scenario server"),
        ("bench bundle --gate typo.toml", "max_bundle"),
        ("bench bundle --gate ratio.toml", "give --reference"),
        ("bench bundle --gate right.toml", "give --labelled"),
        ("bench bundle --gate gone.toml", "gone.tsv"),
        ("bench bundle -o nowhere/report", "nowhere does not exist"),
    ):
        ran = run_here(*command.split(), cwd=place)
        assert ran.code == 2 and len(ran.err.splitlines()) == 1 and part in ran.err, ran.err
    assert not (place / "bench-report").exists()


def test_texts_of_ones_own_against_an_earlier_report(place: Path) -> None:
    own = SHORT.replace(
        "--length 8", "--data acme.tsv --scenario single-stream --scenario idle-gap --idle-seconds 0.01"
    )
    own = own.replace("--seconds 0.4 --samples 6", "--seconds 5 --samples 40")
    assert run_here(*own.split(), cwd=place).code == 0
    before = place / "report" / "report.json"
    before.rename(place / "before.json")
    ran = run_here(*own.split(), "--reference", "before.json", "--json", cwd=place)
    found = ran.json
    assert ran.code == 0 and {item["length"] for item in found["measurements"]} == {None}
    assert {item["scenario"] for item in found["measurements"]} == {"single-stream", "idle-gap"}
    assert {item["baseline"] for item in found["comparisons"]} == {"earlier report"}
