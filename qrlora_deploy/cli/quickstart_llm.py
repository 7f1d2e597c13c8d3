"""What `qrlora-deploy quickstart --llm` prints."""

from typing import TYPE_CHECKING, Any

from qrlora_deploy.cli.output import Output, Table, size_text

if TYPE_CHECKING:
    from qrlora_deploy.quickstart.llm_report import LlmReport


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
