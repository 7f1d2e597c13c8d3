"""The options of `qrlora-deploy serve` that bound what runs and what waits."""

import click

from qrlora_deploy.cli.options import together
from qrlora_deploy.cli.ranges import COUNT, FiniteRange, WholeRange

SECONDS = FiniteRange(min=0, max=86_400)
QUEUE_MS = FiniteRange(min=0, max=86_400_000)

OPTIONS = (
    click.option("--threads", type=WholeRange(1, 1024), help="Threads within an operator."),
    click.option("--buckets", metavar="ROWS:LENGTHS", help="Run in these shapes only, such as 1,8,32:32,128."),
    click.option("--max-rows", type=COUNT, help="Rows of the table of customers; without it the table grows."),
    click.option(
        "--merged-cache-mib",
        type=WholeRange(0, 2**31 - 1),
        default=0,
        show_default=True,
        help="MiB of merged weights of customers who have whole batches.",
    ),
    click.option(
        "--max-answers",
        type=COUNT,
        default=8,
        show_default=True,
        help="Of a decoder: texts that are written side by side.",
    ),
    click.option(
        "--max-cache-mib", type=COUNT, default=1024, show_default=True, help="MiB of keys and values of --max-answers."
    ),
    click.option(
        "--max-batch-tokens",
        type=COUNT,
        default=16384,
        show_default=True,
        help="A run has so many rows x tokens at most.",
    ),
    click.option(
        "--max-wait-ms", type=SECONDS, default=0.0, show_default=True, help="So long a free engine waits for more rows."
    ),
    click.option(
        "--max-queue-rows",
        type=COUNT,
        default=4096,
        show_default=True,
        help="Rows that wait at most; more get status 429.",
    ),
    click.option(
        "--max-queue-ms",
        type=QUEUE_MS,
        default=2000.0,
        show_default=True,
        help="What is ahead of a request may take so long, and twice what one takes, as measured; more gets 429.",
    ),
    click.option(
        "--max-body-mib",
        type=WholeRange(1, 2047),
        default=64,
        show_default=True,
        help="MiB of a request's body; more gets 413.",
    ),
)


limit_options = together(OPTIONS)
"""Add the options to a command."""
