"""Options of `qrlora-deploy bench`: what is measured, and how."""

from pathlib import Path

import click

from qrlora_deploy.cli.options import EXISTING_FILE, FOLDER, Command, provider_option, seed_option, together
from qrlora_deploy.cli.ranges import COUNT, FiniteRange, WholeRange

SCENARIOS = ("single-stream", "offline", "generation", "server", "idle-gap", "cold-start", "swap")
PEERS = ("torch-eager", "torch-compile", "peft")


def what_options(function: Command) -> Command:
    """Options that say what is measured."""
    return together(
        [
            click.option(
                "--scenario",
                "scenarios",
                type=click.Choice(SCENARIOS),
                multiple=True,
                help="What is measured; repeatable. Default: single-stream and offline, of a decoder generation.",
            ),
            click.option(
                "--batch",
                "batches",
                type=COUNT,
                multiple=True,
                default=(1, 8),
                show_default=True,
                help="Rows of a run; repeatable.",
            ),
            click.option(
                "--length",
                "--prompt-tokens",
                "lengths",
                type=WholeRange(2, 2**31 - 1),
                multiple=True,
                help="Tokens of a row, or of a decoder's prompt; default 32 and 128.",
            ),
            click.option("--new-tokens", type=COUNT, help="Of a decoder's answers; default 32."),
            click.option(
                "--data", type=EXISTING_FILE, help="Labelled file whose texts are the inputs, as long as they are."
            ),
            click.option("--customers", type=FOLDER, help="Folder of customers' files for the switchable bundles."),
            click.option(
                "--mix",
                type=click.Choice(["different", "one", "base"]),
                default="different",
                show_default=True,
                help="Whose the rows of a batch are: different customers', one's, or the base's.",
            ),
            click.option(
                "--labelled",
                type=FOLDER,
                help="Folder of labelled files, <customer>.tsv, .csv, .jsonl or .parquet, for the accuracy.",
            ),
            click.option(
                "--reference",
                type=click.Path(exists=True, path_type=Path),
                help="What runs now: a bundle, measured in turn with the others, or an earlier report.json.",
            ),
            click.option(
                "--peer",
                "peers",
                type=click.Choice(PEERS),
                multiple=True,
                help="PyTorch beside the bundles, never judged; needs --base. Repeatable.",
            ),
            click.option("--base", type=FOLDER, help="Hugging Face checkpoint of the peers."),
        ]
    )(function)


def how_options(function: Command) -> Command:
    """Options that say how it is measured."""
    positive = FiniteRange(min=0, min_open=True)
    return together(
        [
            provider_option,
            click.option("--threads", type=COUNT, help="Threads of an operator. Default: ONNX Runtime's choice."),
            click.option(
                "--cuda-graph",
                type=click.Choice(["off", "on", "both"]),
                default="off",
                show_default=True,
                help="Captured CUDA graphs of the shapes; both: each bundle twice.",
            ),
            click.option(
                "--seconds",
                type=positive,
                default=20.0,
                show_default=True,
                help="A measurement ends by then, stable or not.",
            ),
            click.option(
                "--samples",
                type=WholeRange(6, 2**31 - 1),
                default=368,
                show_default=True,
                help="Runs that each bundle needs before a stable measurement ends; 368 give a p99, 3688 a p99.9.",
            ),
            seed_option,
            click.option(
                "--p99-budget-ms",
                type=positive,
                help="Scenario server: the p99 that a rate must keep. Default: 5 times the slowest median.",
            ),
            click.option(
                "--ttft-ms", type=positive, help="Budget of a decoder's time to first token, for the goodput."
            ),
            click.option("--tpot-ms", type=positive, help="The same of its time per output token."),
            click.option(
                "--server-runs", type=COUNT, default=6, show_default=True, help="Scenario server: rates that are tried."
            ),
            click.option(
                "--workers", type=COUNT, default=1, show_default=True, help="Scenario server: threads that answer."
            ),
            click.option(
                "--idle-seconds",
                type=positive,
                default=1.0,
                show_default=True,
                help="Scenario idle-gap: the rest before each run.",
            ),
            click.option(
                "--repeats",
                type=COUNT,
                default=6,
                show_default=True,
                help="How many rests of idle-gap, or cold starts.",
            ),
            click.option(
                "--swaps-per-s",
                type=positive,
                default=20.0,
                show_default=True,
                help="Scenario swap: customers that are loaded a second.",
            ),
        ]
    )(function)
