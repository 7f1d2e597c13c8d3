"""`qrlora-deploy project`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qrlora_deploy.cli.options import FOLDER, basis_option, common, output_option
from qrlora_deploy.cli.output import Output, size_text
from qrlora_deploy.cli.ranges import FiniteRange

SHOWN = 3
"""So many of the things that are worst held are named."""


@click.command("project")
@click.argument("source", type=FOLDER)
@click.option("--base", required=True, help="Folder or hub name of the base that SOURCE was tuned from.")
@basis_option(required=True)
@output_option("Coefficients file to write.")
@click.option("--labels", help="Names of the outputs of a LoRA's own head, with commas.")
@click.option(
    "--least-share",
    type=FiniteRange(0, 1),
    default=0.0,
    show_default=True,
    help="Write nothing where the coefficients hold less than this share of the update.",
)
@common
def command(source: Path, base: str, basis: Path, output: Path, labels: str | None, least_share: float) -> Output:
    """Turn SOURCE, a LoRA folder of PEFT or a tuned checkpoint, into a customer of a basis.

    The coefficients are those whose update comes closest to that of SOURCE. The share says how much of its squared
    norm they hold; what that is worth only data can tell, and `train --start` goes on from there.

    \b
    Examples:
      qrlora-deploy project acme-lora --base base --basis basis.safetensors -o acme.safetensors
      qrlora-deploy train base --basis basis.safetensors --start acme.safetensors --data acme.tsv -o better.safetensors
    """
    from qrlora_deploy.api.projecting import project
    from qrlora_deploy.errors import CheckFailed
    from qrlora_deploy.formats.coefficients import FORMAT
    from qrlora_deploy.io.files import has_format
    from qrlora_deploy.io.outputs import check_replaceable

    check_replaceable(output, "coefficients file", has_format(FORMAT))
    names = tuple(name.strip() for name in labels.split(",")) if labels else ()
    made = project(source, base, basis, labels=names)
    record = {"share": made.share, "targets": dict(made.targets), "left_out": dict(made.left_out)}
    changed = len(made.targets) + len(made.left_out)
    facts: dict[str, Any] = {"share": f"{made.share:.3f}", "targets": f"{len(made.targets)} of {changed}"}
    if made.left_out:
        facts["left out"] = _worst(made.left_out)
    if made.share < least_share:
        line = f"{source}: the coefficients hold {made.share:.3f} of its update, less than {least_share}: not written"
        return Output(record, line, facts, failure=CheckFailed(line))
    customer = made.customer
    customer.save(output)
    size_bytes = output.stat().st_size
    written = {"output": output, "size_bytes": size_bytes, "digest": customer.digest}
    facts |= {"digest": customer.digest, "coefficients": len(customer.values), "size": size_text(size_bytes)}
    return Output(written | record, f"wrote {output}", facts)


def _worst(left_out: Mapping[str, float]) -> str:
    """The largest shares of what the basis has no target for."""
    shares = sorted(left_out.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {share:.3f}" for name, share in shares[:SHOWN])
    return shown + (f" and {len(shares) - SHOWN} more" if len(shares) > SHOWN else "")
