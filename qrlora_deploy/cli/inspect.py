"""`qrlora-deploy inspect`."""

from collections import Counter
from pathlib import Path
from typing import Any

import click

from qrlora_deploy.cli.options import ANY_PATH, basis_option, common
from qrlora_deploy.cli.output import Output, Table, size_text
from qrlora_deploy.errors import InputError
from qrlora_deploy.installation.parts import need


@click.command("inspect")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@basis_option(required=False)
@click.option("--plot", "output", type=ANY_PATH, help="Also draw it: a .png, .svg or .pdf to write.")
@common
def command(path: Path, basis: Path | None, output: Path | None) -> Output:
    """What PATH is and what it holds: a basis, a coefficients file, a bundle or a checkpoint.

    \b
    Examples:
      qrlora-deploy inspect basis.safetensors --plot energies.png
    """
    from qrlora_deploy.inspection.describe import describe
    from qrlora_deploy.io.outputs import check_free_file

    if output is not None:
        need("bench", "`inspect --plot`", ["matplotlib"])
        check_free_file(output)
    found = describe(path, basis)
    if basis is not None and found.coefficients is None:
        raise InputError(f"--basis belongs to a coefficients file, and {path} is a {found.kind}; leave it out")
    if output is not None:
        from qrlora_deploy.inspection.plots import plot_basis, plot_coefficients

        if found.coefficients is not None:
            plot_coefficients(found.coefficients, found.basis, output)
        elif found.basis is not None:
            plot_basis(found.basis, output)
        else:
            raise InputError(f"--plot draws a basis or a coefficients file, and {path} is a {found.kind}")
    facts = {"size": size_text(found.size_bytes)} | dict(found.facts)
    facts |= {name: _tensors(facts[name]) for name in ("inputs", "outputs") if isinstance(facts.get(name), list)}
    tables = [Table(list(found.targets[0]), [list(row.values()) for row in found.targets])] if found.targets else []
    record = {"kind": found.kind, "path": path, "size_bytes": found.size_bytes, **found.facts, "targets": found.targets}
    return Output(record, f"{path}: {found.kind}", facts, tables)


CACHES = ("past_key_values.", "present.")


def _tensors(tensors: list[dict[str, Any]]) -> list[str]:
    """A graph's inputs or outputs, each as `name dtype [shape]`; a decoder's caches, two a layer, as one."""
    shown = [_tensor(one) for one in tensors if not one["name"].startswith(CACHES)]
    caches = [one | {"name": one["name"].partition(".")[0]} for one in tensors if one["name"].startswith(CACHES)]
    return shown + [f"{count} caches {kind}" for kind, count in Counter(map(_tensor, caches)).items()]


def _tensor(tensor: dict[str, Any]) -> str:
    return f"{tensor['name']} {tensor['dtype']} [{', '.join(map(str, tensor['shape']))}]"
