"""`qrlora-deploy quickstart --llm`: what it keeps where it is interrupted, and what it prints."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrlora_deploy.cli.options import tell_if_interrupted
from qrlora_deploy.cli.output import Output, Table, progress_bar, size_text

if TYPE_CHECKING:
    from qrlora_deploy.quickstart.llm_report import LlmReport


def run_llm(output: Path | None, base: str, resume: bool, device: str, seed: int) -> Output:
    """Go the whole way; an empty `base` is the default one."""
    from qrlora_deploy.models.hub import SMALL_DECODER
    from qrlora_deploy.quickstart import llm
    from qrlora_deploy.quickstart.journal import holds_work
    from qrlora_deploy.training.checkpoints import folder_of_run

    if output is not None:
        work = folder_of_run(output)
        tell_if_interrupted(lambda: f"{work} is kept: the same command goes on by --resume" if holds_work(work) else "")
    with progress_bar() as progress:
        return llm_output(llm.run(output, progress, seed, device, base or SMALL_DECODER, resume=resume))


def llm_output(report: "LlmReport") -> Output:
    """The report as a command prints it."""
    kept = f"kept in {report.folder}" if report.folder else "nothing was kept; --out FOLDER keeps it"
    steps = ", ".join(f"{step} {seconds:.0f}" for step, seconds in report.seconds.items())
    facts = {
        "base": report.base,
        "coefficients per customer": f"{report.coefficients} in {report.layers} layers",
        **{f"size of {name}": size_text(size) for name, size in report.sizes.items()},
        "time": f"{sum(report.seconds.values()):.0f} s: {steps}",
        "files": kept,
    }
    headline = f"{len(report.customers)} customers of one decoder, and the base, in one batch of {report.rows} rows"
    return Output(report, headline, facts, [_matches(report), _answers(report)])


def _matches(report: "LlmReport") -> Table:
    rows: list[list[Any]] = [
        [each.name, each.rows, each.held_out_rows, f"{100 * each.before:.1f} %", f"{100 * each.after:.1f} %"]
        for each in report.customers
    ]
    columns = ("customer", "trained on", "held out", "base", "customer's")
    return Table(columns, rows, "Held-out prompts that are answered exactly as in the data")


def _answers(report: "LlmReport") -> Table:
    askers = list(report.written[0].answers)
    rows: list[list[Any]] = [
        [f"{each.customer}: {each.prompt}", each.expected, *(_short(each.answers[asker]) for asker in askers)]
        for each in report.written
    ]
    return Table(("prompt of", "expected", *askers), rows, "Held-out prompts and what each wrote, all in one batch")


def _short(text: str) -> str:
    """On one line."""
    words = " ".join(text.split())
    return words if len(words) <= 60 else words[:57] + "..."
