"""Exporters by name: ours, those of other packages, and two of one name, which are refused."""

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from qrlora_deploy.errors import InputError
from qrlora_deploy.exporting import registry as exporting
from qrlora_deploy.exporting.registry import BUILT_IN, GROUP, find_exporter


class Package:
    """A distribution, as far as an entry point tells of it."""

    def __init__(self, name: str) -> None:
        self.name = name


def point(name: str, value: str, package: str) -> EntryPoint:
    made = EntryPoint(name, value, GROUP)
    vars(made)["dist"] = Package(package)
    return made


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Makes the system know entry points beside this package's own."""

    def install(*points: EntryPoint) -> None:
        own = [point(built_in.name, built_in.value, "qrlora-deploy") for built_in in BUILT_IN]
        monkeypatch.setattr(exporting, "entry_points", lambda group: EntryPoints([*own, *points]))

    return install


def test_what_this_package_registers_itself_is_no_second_one(register) -> None:  # type: ignore[no-untyped-def]
    register()
    from exporters.onnx import export_bundle

    assert find_exporter("onnx") is export_bundle


def test_another_package_cannot_take_the_place_of_an_exporter_of_ours(register) -> None:  # type: ignore[no-untyped-def]
    register(point("onnx", "json:dumps", "other-exporters"))
    with pytest.raises(InputError) as caught:
        find_exporter("onnx")
    assert "--format onnx is registered more than once" in str(caught.value)
    assert "qrlora-deploy (exporters.onnx:export_bundle)" in str(caught.value)
    assert "other-exporters (json:dumps)" in str(caught.value)


def test_two_other_packages_of_one_name_are_both_named(register) -> None:  # type: ignore[no-untyped-def]
    register(point("flat", "json:dumps", "first"), point("flat", "json:loads", "second"))
    with pytest.raises(InputError, match=r"by first \(json:dumps\) and second \(json:loads\); remove one of them"):
        find_exporter("flat")


def test_an_exporter_of_another_package_is_found(register) -> None:  # type: ignore[no-untyped-def]
    import json

    register(point("flat", "json:dumps", "other-exporters"))
    assert find_exporter("flat") is json.dumps  # type: ignore[comparison-overlap]
    with pytest.raises(InputError, match="no such exporter; there are flat, onnx, onnx-adapter, peft"):
        find_exporter("nothing")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:run", "the exporter of broken cannot be loaded: No module named 'no_such_module'"),
        ("json:nothing", "the exporter of broken cannot be loaded"),
        ("json:__name__", "is no exporter"),
    ],
)
def test_an_exporter_that_cannot_be_loaded_names_its_package(register, value: str, message: str) -> None:  # type: ignore[no-untyped-def]
    register(point("flat", value, "broken"))
    with pytest.raises(InputError, match="--format flat") as caught:
        find_exporter("flat")
    assert message in str(caught.value) and "broken" in str(caught.value)


def test_a_fault_of_our_own_exporter_is_no_bad_input(register, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    register()
    monkeypatch.setattr(exporting, "BUILT_IN", (EntryPoint("ours", "no_such_module:run", GROUP),))
    with pytest.raises(ModuleNotFoundError):
        find_exporter("ours")
