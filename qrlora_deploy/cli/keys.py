"""`qrlora-deploy keys`."""

from pathlib import Path

import click

from qrlora_deploy.cli.options import ANY_PATH, EXISTING_FILE, CustomerId, common
from qrlora_deploy.cli.output import Output, Table
from qrlora_deploy.errors import InputError


@click.group("keys")
def command() -> None:
    """Who may ask a server for whom: add, list and revoke keys in a file, which `serve` follows while it runs.

    The file holds salted hashes; a key itself is shown once, when it is made.

    \b
    Examples:
      qrlora-deploy keys add keys.json --customer acme
      qrlora-deploy keys list keys.json
    """


@command.command("add")
@click.argument("file", type=ANY_PATH)
@click.option(
    "--customer",
    "customers",
    multiple=True,
    type=CustomerId(everyone=True),
    metavar="ID",
    help="It may ask for this customer; * is everyone. Repeatable.",
)
@click.option(
    "--group", "groups", multiple=True, help="It may ask for the customers of this group of FILE. Repeatable."
)
@click.option("--admin", is_flag=True, help="It may use the admin API.")
@click.option("--expires", help="A day or a time in ISO 8601, such as 2027-12-31; without a zone in UTC.")
@click.option("--note", default="", help="For people, such as who has it.")
@common
def add(
    file: Path, customers: tuple[str, ...], groups: tuple[str, ...], admin: bool, expires: str | None, note: str
) -> Output:
    """Make a key and show it once; FILE is made where it is missing.

    \b
    Examples:
      qrlora-deploy keys add keys.json --customer acme --customer bolt --expires 2027-12-31
    """
    from qrlora_deploy.serving.keys_file import changing_keys, empty_keys, read_keys, with_key, write_keys

    if not (customers or groups or admin):
        raise InputError("the key would allow nothing; give --customer, --group or --admin")
    with changing_keys(file):
        before = read_keys(file) if file.exists() else empty_keys()
        changed, stored, key = with_key(before, list(customers), list(groups), admin, expires, note)
        write_keys(changed, file)
    record = {"key": key, "id": stored.id, "file": file, "keys": len(changed.keys)}
    facts = {"key": key, "id": stored.id, "shown": "this once; the file holds its hash alone"}
    return Output(record, f"added a key to {file}", facts)


@command.command("list")
@click.argument("file", type=EXISTING_FILE)
@common
def show(file: Path) -> Output:
    """The keys of FILE, without what would let anybody use them.

    \b
    Examples:
      qrlora-deploy keys list keys.json --json
    """
    from qrlora_deploy.serving.keys_file import read_keys

    keys = read_keys(file)
    rows = [key.model_dump(exclude={"hash"}) for key in keys.keys]
    record = {"file": file, "keys": rows, "groups": keys.groups, "quotas": keys.quotas}
    columns = ["id", "customers", "groups", "admin", "expires", "note"]
    tables = [Table(columns, [[row[name] for name in columns] for row in rows])]
    return Output(record, f"{file}: {len(rows)} keys", tables=tables)


@command.command("revoke")
@click.argument("file", type=EXISTING_FILE)
@click.argument("key_id", metavar="ID")
@common
def revoke(file: Path, key_id: str) -> Output:
    """Take a key out of FILE; a server that runs refuses it some seconds later.

    \b
    Examples:
      qrlora-deploy keys revoke keys.json 3f9a01c2b7d4
    """
    from qrlora_deploy.serving.keys_file import changing_keys, read_keys, without_key, write_keys

    with changing_keys(file):
        changed = without_key(read_keys(file), key_id, file)
        write_keys(changed, file)
    return Output({"id": key_id, "file": file, "keys": len(changed.keys)}, f"revoked {key_id}")
