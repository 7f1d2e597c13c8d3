"""`qrlora-deploy bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrlora_deploy.cli.bench_options import how_options, what_options
from qrlora_deploy.cli.options import EXISTING_FILE, FOLDER, common, refuse_idle
from qrlora_deploy.cli.output import Output, Table, progress_bar
from qrlora_deploy.cli.sections import SectionedCommand
from qrlora_deploy.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from qrlora_deploy.bench.gate_file import GateRules
    from qrlora_deploy.bench.report import Report
    from qrlora_deploy.bench.settings import BenchSettings


IDLE_WITHOUT = {
    ("server_runs",): ("server",),
    ("idle_seconds",): ("idle-gap",),
    ("repeats",): ("idle-gap", "cold-start"),
    ("swaps_per_s",): ("swap",),
}
"""Parameters that mean something in one of these scenarios alone."""

SHOWN = 5
"""Tables in the terminal; the files have all of them."""


def _print_example(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        from qrlora_deploy.bench.gate_file import EXAMPLE

        click.echo(EXAMPLE, nl=False)
        context.exit()


REPORTS = ("json", "md", "html")
"""Kinds of the files of a report, the one with everything first."""


SECTIONS = {
    "scenarios": "What is measured",
    "provider": "How it is measured",
    "p99_budget_ms": "Single scenarios",
    "gate": "Judging, and the report",
}
"""Titles of the help by the first option of each part."""


@click.command("bench", cls=SectionedCommand, sections=SECTIONS)
@click.argument("bundles", metavar="BUNDLE [BUNDLE ...]", type=FOLDER, nargs=-1, required=True)
@what_options
@how_options
@click.option("--gate", type=EXISTING_FILE, help="Rules, TOML; exit code 1 where one is not met.")
@click.option(
    "--gate-example",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_example,
    help="Print a gate file with comments, and end.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default="bench-report",
    show_default=True,
    help="Folder for report.json, report.md and report.html.",
)
@common
def command(bundles: tuple[Path, ...], gate: Path | None, output: Path, **settings: Any) -> Output:
    """Measure every BUNDLE on this machine, in turn, and judge them.

    The first bundle, or the --reference, is what the others are compared with. With --gate the exit
    code is 1 where a rule is not met or cannot be decided: too few samples, or not stable.

    \b
    Examples:
      qrlora-deploy bench new-bundle --reference old-bundle --customers customers
      qrlora-deploy bench --gate-example > gate.toml
      qrlora-deploy bench bundle --customers customers --labelled dev --gate gate.toml
      qrlora-deploy bench bundle --scenario server --p99-budget-ms 20 --data texts.tsv --batch 1
      qrlora-deploy bench decoder --customers customers --prompt-tokens 128 --new-tokens 64 --ttft-ms 500 --tpot-ms 50
    """
    from qrlora_deploy.bench.choosing import settled
    from qrlora_deploy.bench.gate import judge
    from qrlora_deploy.bench.gate_file import labelled_data, read_gate
    from qrlora_deploy.bench.run import run_benchmark
    from qrlora_deploy.bench.settings import BenchSettings
    from qrlora_deploy.io.outputs import check_report_folder

    chosen = settled(BenchSettings(bundles=bundles, **settings))
    _refuse_idle(settings, chosen)
    rules, data = None, dict[str, Path]()
    if gate is not None:
        rules = read_gate(gate)
        data = labelled_data(rules, gate)
        _check_measured(rules, chosen, data)
    check_report_folder(output)
    _check_reports_alone(output)
    with progress_bar() as progress:
        report = run_benchmark(chosen, progress, data)
    if rules is not None and gate is not None:
        report = report.model_copy(update={"gate": judge(report, rules, gate.name)})
    return _output(report, _write(report, output))


def _refuse_idle(settings: dict[str, Any], chosen: "BenchSettings") -> None:
    measured = set(chosen.scenarios)
    # A decoder's server has two budgets instead, and one thread that steps it.
    alone = "server" in measured and chosen.new_tokens is None
    refuse_idle(("p99_budget_ms", "workers"), alone, "there is --scenario server, of no decoder")
    for names, scenarios in IDLE_WITHOUT.items():
        needed = " or ".join(f"--scenario {name}" for name in scenarios)
        refuse_idle(names, not measured.isdisjoint(scenarios), f"there is {needed}")
    refuse_idle(["base"], bool(settings["peers"]), "there is --peer, of which it is the checkpoint")
    refuse_idle(["mix"], settings["customers"] is not None, "there are --customers")


def _check_measured(rules: "GateRules", settings: "BenchSettings", data: dict[str, Path]) -> None:
    """Refuse a gate that cannot be met by what is measured, before minutes are spent."""
    wanted: set[str] = {rule.scenario for rule in rules.latency}
    wanted |= {"offline"} if rules.throughput else set()
    wanted |= {"server"} if rules.capacity is not None else set()
    wanted |= {"generation"} if rules.generation else set()
    missing = sorted(wanted - set(settings.scenarios))
    if missing:
        options = " ".join(f"--scenario {name}" for name in missing)
        raise InputError(f"--gate has rules for what is not measured: add {options}")
    from qrlora_deploy.io.reading import is_file

    absent = [str(path) for path in data.values() if not is_file(path)]
    if absent:
        raise InputError(f"--gate names labelled files that do not exist: {', '.join(absent)}")
    if rules.accuracy is not None and not data and settings.labelled is None:
        raise InputError("--gate has rules for the accuracy: give --labelled, or name files under [accuracy.data]")
    goodput = any(rule.min_goodput_per_s for rule in rules.generation)
    if goodput and settings.ttft_ms is None and settings.tpot_ms is None:
        raise InputError("--gate has rules for the goodput: give its budgets by --ttft-ms and --tpot-ms")
    ratios = any(rule.max_ratio for rule in rules.latency) or any(rule.min_ratio for rule in rules.throughput)
    ratios = ratios or any(rule.compares for rule in rules.generation)
    if ratios and settings.reference is None and len(settings.bundles) == 1 and settings.cuda_graph != "both":
        raise InputError("--gate has rules for ratios: give --reference, or a second bundle")


def _check_reports_alone(folder: Path) -> None:
    """Refuse to replace a file that has the name of a report and is none."""
    from qrlora_deploy.bench.report import is_report

    file = folder / f"report.{REPORTS[0]}"
    if file.exists() and not is_report(file):
        raise InputError(f"{file} already exists and is no report of bench; remove it or give another --output")


def _write(report: "Report", folder: Path) -> dict[str, str]:
    """The three files, by suffix; all of them are written, or none."""
    from qrlora_deploy.bench.markdown import render_markdown
    from qrlora_deploy.bench.page import render_page
    from qrlora_deploy.bench.report import write_report
    from qrlora_deploy.io.files import atomic_files

    with atomic_files(folder) as temporary:
        write_report(report, temporary / "report.json")
        (temporary / "report.md").write_text(render_markdown(report), encoding="utf-8")
        (temporary / "report.html").write_text(render_page(report), encoding="utf-8")
    return {suffix: str(folder / f"report.{suffix}") for suffix in REPORTS}


def _output(report: "Report", files: dict[str, str]) -> Output:
    from qrlora_deploy.bench.sections import sections, verdict_line

    failure = None
    if report.gate is not None and not report.gate.passed:
        bad = [verdict.line for verdict in report.gate.verdicts if verdict.outcome != "passed"]
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        failure = CheckFailed(f"the gate {report.gate.file} failed: {bad[0]}{more}")
    # Raw samples are in the file: on stdout they would be megabytes.
    record = report.model_dump(mode="json")
    record["measurements"] = [
        {name: value for name, value in item.items() if name != "samples"} for item in record["measurements"]
    ]
    facts = {"written": files, **{f"note {index + 1}": note for index, note in enumerate(report.notes)}}
    tables = [Table(section.columns, section.rows, section.title) for section in sections(report)[:SHOWN]]
    return Output(record | {"files": files}, verdict_line(report), facts, tables, failure=failure)
