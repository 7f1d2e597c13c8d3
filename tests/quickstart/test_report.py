"""What the command prints from a report."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from qrlora_deploy.cli.output import show
from qrlora_deploy.cli.quickstart import output_of
from qrlora_deploy.quickstart.measuring import Accuracy
from qrlora_deploy.quickstart.report import Answer, CustomerResult, Latency, Parity, QuickstartReport


@pytest.fixture
def report() -> QuickstartReport:
    return QuickstartReport(
        coefficients=3047,
        layers=36,
        sizes={"the base": 91_800_000, "one customer": 15_700},
        customers=(CustomerResult("banking", 1500, 450, Accuracy(0.72, 0.75), Accuracy(0.873, 0.9)),),
        merged="banking",
        parity=Parity(2.4e-6, 3.5e-4, 1.0, 35),
        latency=Latency(1.71, 5.07, 200),
        device="2 CPUs",
        answers=(Answer("send money", "transfer", 0.9, "transfer"),),
        seconds={"warm up": 80.4, "train": 100.1},
        folder=None,
    )


def printed(report: QuickstartReport, as_json: bool = False) -> str:
    stream = io.StringIO()
    show(output_of(report), as_json, stream)
    return stream.getvalue()


def test_text_holds_every_figure(report: QuickstartReport) -> None:
    text = printed(report)
    expected = ["3047 in 36 layers", "15.7 kB", "72.0 %", "87.3 %", "75.0 %", "90.0 %", "2.4e-06", "3.5e-04"]
    expected += ["1.71 ms", "5.07 ms", "200 runs", "2 CPUs", "180 s: warm up 80, train 100", "send money"]
    assert [part for part in expected if part not in text] == []


def test_text_says_where_the_files_are(report: QuickstartReport) -> None:
    assert "nothing was kept" in printed(report)
    kept = printed(replace(report, folder=Path("trial")))
    assert "kept in trial" in kept and "qrlora-deploy predict trial/banking-bundle" in kept


def test_json_holds_the_whole_report(report: QuickstartReport) -> None:
    record = json.loads(printed(report, as_json=True))
    assert record["customers"][0]["after"] == {"all_labels": 0.873, "own_labels": 0.9}
    assert record["coefficients"] == 3047
    assert record["latency"]["runs"] == 200
    assert record["folder"] is None
