"""`qrlora-deploy convert`."""

from pathlib import Path

import click

from qrlora_deploy.cli.options import EXISTING_FILE, common, output_option
from qrlora_deploy.cli.output import Output


@click.command("convert")
@click.argument("source", metavar="FILE.gguf", type=EXISTING_FILE)
@output_option("Folder to write.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Of the weights that are written.",
)
@common
def command(source: Path, output: Path, dtype: str) -> Output:
    """Write the decoder of a GGUF file as a checkpoint in safetensors, which all other commands read.

    Its quantised weights become plain numbers, the rounded ones: what rounding took is not given back.

    \b
    Examples:
      qrlora-deploy convert SmolLM2-135M-Instruct.Q4_1.gguf -o base
    """
    from qrlora_deploy.api.converting import convert

    record = convert(source, output, dtype=dtype)
    return Output({"output": output} | record, f"wrote {output}", record)
