"""`qrlora-deploy customers`."""

from pathlib import Path

import click

from qrlora_deploy.cli.options import EXISTING_FILE, FOLDER, CustomerId, common
from qrlora_deploy.cli.output import Output


@click.group("customers")
def command() -> None:
    """Remove customers for good, from folders and packed files.

    \b
    Examples:
      qrlora-deploy customers erase acme --customers customers
    """


@command.command("erase")
@click.argument("customer", type=CustomerId(), metavar="ID")
@click.option("--customers", "folders", multiple=True, type=FOLDER, help="Folder of coefficients files. Repeatable.")
@click.option("--packed", multiple=True, type=EXISTING_FILE, help="Packed file. Repeatable.")
@common
def erase(customer: str, folders: tuple[Path, ...], packed: tuple[Path, ...]) -> Output:
    """Remove a customer for good: its file, the versions that were kept of it, its row in packed files.

    A server that follows the folder stops to answer for it within moments; one that has loaded it from a packed file
    keeps it until it is restarted, or asked by its admin API. Backups are yours to clean.

    \b
    Examples:
      qrlora-deploy customers erase acme --customers customers --packed customers.packed.safetensors
    """
    from qrlora_deploy.errors import InputError, UnknownCustomerError
    from qrlora_deploy.runtime.customers.packed_erasing import erase_packed
    from qrlora_deploy.serving.customer_folder import erase_files

    if not (folders or packed):
        raise InputError("nothing to erase from; give --customers DIR, --packed FILE or both")
    # The one that may fail comes first.
    erased = [file for file in packed if erase_packed(file, customer)]
    erased += [folder for folder in folders if erase_files(folder, customer)]
    if not erased:
        raise UnknownCustomerError(f"{customer} is in none of {', '.join(map(str, [*folders, *packed]))}")
    where = ", ".join(map(str, erased))
    return Output({"customer": customer, "erased_from": erased}, f"erased {customer} from {where}")
