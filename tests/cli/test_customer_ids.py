"""Every option that names a customer refuses what can be none, by the rule for files, in one line."""

from pathlib import Path

import click
import pytest

from qrlora_deploy.cli import cli
from qrlora_deploy.cli.options import CustomerId
from tests.cli.running import run_here

BAD = ("../x", "", ".hidden", "a b", "a/b", "é", "x" * 129, "*a")

LINES = {
    "serve": "serve {bundle} --check --port 0 --count-customer",
    "serve --ray": "serve {bundle} --check --port 0 --ray --count-customer",
    "predict": "predict {bundle} --text hello --customers {folder} --customer",
    "predict --repl": "predict {bundle} --repl --customers {folder} --customer",
    "generate": "generate {bundle} --prompt hello --customers {folder} --customer",
    "keys add": "keys add {folder}/keys.json --customer",
    "customers erase": "customers erase --customers {folder}",
}


@pytest.mark.parametrize("name", LINES)
def test_what_can_be_no_customer_is_refused(name: str, switchable: Path, tmp_path: Path) -> None:
    line = LINES[name].format(bundle=switchable, folder=tmp_path).split()
    for bad in BAD if name == "keys add" else (*BAD, "*"):
        ran = run_here(*line, bad, cwd=tmp_path)
        assert ran.code == 2 and "is no customer id: 1 to 128 of A-Z a-z 0-9 . _ - are allowed" in ran.err, ran.err
        assert len(ran.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_no_option_that_names_a_customer_has_another_rule() -> None:
    found = [
        parameter
        for command in _commands(cli)
        for parameter in command.params
        if parameter.name in ("customer", "counted") or {"--customer", "--count-customer"} & {*parameter.opts}
    ]
    assert len(found) >= 5 and all(isinstance(parameter.type, CustomerId) for parameter in found), found


def _commands(command: click.Command) -> list[click.Command]:
    if not isinstance(command, click.Group):
        return [command]
    context = click.Context(command)
    return [
        inner
        for name in command.list_commands(context)
        if (sub := command.get_command(context, name)) is not None
        for inner in _commands(sub)
    ]
