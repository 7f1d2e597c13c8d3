"""`qrlora-deploy combine`."""

import math
from pathlib import Path

import click

from qrlora_deploy.cli.options import common, output_option
from qrlora_deploy.cli.output import Output, size_text
from qrlora_deploy.errors import InputError


@click.command("combine")
@click.argument("parts", nargs=-1, required=True, metavar="FILE[:WEIGHT]...")
@output_option("Coefficients file to write.")
@common
def command(parts: tuple[str, ...], output: Path) -> Output:
    """Add customers of one basis up, each FILE times its WEIGHT: 1 where left out, negative takes away.

    The sum of their updates is the update of the sum: exact to one rounding to fp32. How good the
    combined customer is, only data can tell.

    \b
    Examples:
      qrlora-deploy combine acme.safetensors:0.7 umbrella.safetensors:0.3 -o both.safetensors
    """
    from qrlora_deploy.api.combining import combine
    from qrlora_deploy.formats.coefficients import FORMAT
    from qrlora_deploy.io.files import has_format
    from qrlora_deploy.io.outputs import check_replaceable

    check_replaceable(output, "coefficients file", has_format(FORMAT))
    chosen = [parse_part(part) for part in parts]
    if output.resolve() in [file.resolve() for file, _ in chosen]:
        raise InputError(f"{output} is one of the parts; give another --output")
    combined = combine(chosen)
    combined.save(output)
    size_bytes = output.stat().st_size
    made_of = [
        {"file": file} | part for (file, _weight), part in zip(chosen, combined.training["combined"], strict=True)
    ]
    record = {"output": output, "size_bytes": size_bytes, "digest": combined.digest, "parts": made_of}
    facts = {"digest": combined.digest, "coefficients": len(combined.values), "size": size_text(size_bytes)}
    return Output(record, f"wrote {output}", facts | {str(file): weight for file, weight in chosen})


def parse_part(text: str) -> tuple[Path, float]:
    """`FILE:WEIGHT` or `FILE`; a file whose own name holds the colon is taken as it is.

    Raises:
        InputError: there is no such file, or the weight is not a finite number.
    """
    from qrlora_deploy.io.reading import is_file

    if is_file(Path(text)):
        return Path(text), 1.0
    name, colon, number = text.rpartition(":")
    if not colon or not is_file(Path(name)):
        raise InputError(f"{name if colon else text}: no such file")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise InputError(f"{name}: the weight {number!r:.40} is not a finite number; write {name}:0.5")
    return Path(name), weight
