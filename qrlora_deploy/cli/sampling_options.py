"""Options of `qrlora-deploy generate` that say how tokens are chosen."""

import click

from qrlora_deploy.cli.options import Command, together
from qrlora_deploy.cli.ranges import FiniteRange, WholeRange

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logprobs",
)
"""Options that are fields of `Sampling`, which says what they may be."""


def sampling_options(function: Command) -> Command:
    """How tokens are chosen; the library's own defaults."""
    number, whole, penalty = FiniteRange(), click.INT, FiniteRange(-100, 100)
    options = [
        click.option(
            "--temperature",
            type=number,
            default=0.0,
            show_default=True,
            help="Divides the logits: higher is more random; 0 takes the best token.",
        ),
        click.option(
            "--top-k", type=whole, default=0, show_default=True, help="Draw from so many best tokens; 0: from all."
        ),
        click.option(
            "--top-p",
            type=number,
            default=1.0,
            show_default=True,
            help="Draw from the best tokens whose probabilities reach this sum.",
        ),
        click.option(
            "--min-p",
            type=number,
            default=0.0,
            show_default=True,
            help="Draw from tokens of at least this share of the best one's probability.",
        ),
        click.option(
            "--repetition-penalty",
            type=number,
            default=1.0,
            show_default=True,
            help="Over 1: tokens that prompt or answer have already become less likely.",
        ),
        click.option(
            "--presence-penalty",
            type=penalty,
            default=0.0,
            show_default=True,
            help="Taken from the logits of tokens that the answer has already.",
        ),
        click.option(
            "--frequency-penalty",
            type=penalty,
            default=0.0,
            show_default=True,
            help="The same, for each time that the answer has them.",
        ),
        click.option(
            "--seed", type=WholeRange(0, 2**64 - 1), help="Of the random numbers; without it one is drawn, and told."
        ),
        click.option(
            "--logprobs",
            type=whole,
            help="Tell the log probability of each token, and those of so many best ones (0 to 20).",
        ),
    ]
    return together(options)(function)
