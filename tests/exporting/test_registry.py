"""Exporters by name: ours, those of other packages, and two of one name, which are refused."""

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.exporting import registry
from qrlora_deploy.exporting.registry import BUILT_IN, GROUP, all_exporters, faults_named, find_exporter
from tests.exporting.installed import install

MODULE = """
from dataclasses import dataclass
from qrlora_deploy.exporting.options import option

@dataclass(frozen=True)
class Options:
    depth: int = option(1, "How deep.")

@dataclass(frozen=True)
class Taken:
    text_column: str = option("", "Of something else.")

@dataclass(frozen=True)
class Bare:
    depth: int = 1

class Flat:
    name, options, output, needs_customer, shown = "flat", Options, "file", True, ()
    def export(self, job, options):
        return {}

def changed(**parts):
    return type("Other", (Flat,), parts)()

FLAT = Flat()
OTHER_NAME, OTHER_OUTPUT = changed(name="round"), changed(output="pipe")
NO_DATACLASS, TAKEN, BARE = changed(options=dict), changed(options=Taken), changed(options=Bare)
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of `sys.path` that a test installs packages into, with the module `flat_exporters`."""
    (tmp_path / "flat_exporters.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("flat_exporters", None)


def test_our_own_are_found_however_the_project_is_installed(packages: Path) -> None:
    """An older release registered itself too, under other values."""
    install(packages, "qrlora-deploy", {"onnx": "exporters.onnx:export_bundle"})
    from exporters.onnx.exporter import EXPORTER

    assert find_exporter("onnx") is EXPORTER
    assert [exporter.name for exporter in all_exporters()] == ["genai", "onnx", "onnx-adapter", "peft", "triton"]


def test_another_package_cannot_take_the_place_of_an_exporter_of_ours(packages: Path) -> None:
    install(packages, "other-exporters", {"onnx": "flat_exporters:FLAT"})
    with pytest.raises(InputError) as caught:
        find_exporter("onnx")
    assert str(caught.value) == (
        "format='onnx' is registered more than once, by other-exporters (flat_exporters:FLAT) and qrlora-deploy "
        "(exporters.onnx.exporter:EXPORTER); remove one of them"
    )
    assert "onnx" not in [exporter.name for exporter in all_exporters()]
    assert find_exporter("peft").name == "peft"


def test_two_other_packages_of_one_name_are_both_named(packages: Path) -> None:
    install(packages, "first", {"flat": "flat_exporters:FLAT"})
    install(packages, "second", {"flat": "flat_exporters:FLAT"})
    with pytest.raises(InputError, match=r"by first \(.*\) and second \(.*\); remove one of them"):
        find_exporter("flat")


def test_an_exporter_of_another_package_is_found(packages: Path) -> None:
    install(packages, "other-exporters", {"flat": "flat_exporters:FLAT"})
    assert find_exporter("flat").options().depth == 1
    with pytest.raises(InputError, match="no such exporter; there are flat, genai, onnx, onnx-adapter, peft"):
        find_exporter("nothing")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:run", "cannot be loaded: No module named 'no_such_module'"),
        ("json:nothing", "cannot be loaded"),
        ("json:dumps", "is no exporter: it has no name, options, output, needs_customer, shown, export"),
        ("flat_exporters:Flat", "is a class, not an instance of it"),
        ("flat_exporters:OTHER_NAME", "calls itself 'round'"),
        ("flat_exporters:OTHER_OUTPUT", "writes 'pipe', which is neither file nor folder"),
        ("flat_exporters:NO_DATACLASS", "has options that are no dataclass"),
        ("flat_exporters:BARE", "has options that were not made by `option`: depth"),
        ("flat_exporters:TAKEN", "has options that `export` has itself: text_column"),
    ],
)
def test_what_is_no_exporter_names_its_package(packages: Path, value: str, message: str) -> None:
    install(packages, "broken", {"flat": value})
    with pytest.raises(InputError, match="format='flat': the exporter of broken") as caught:
        find_exporter("flat")
    assert message in str(caught.value)
    assert "flat" not in [exporter.name for exporter in all_exporters()], "it must not keep others from being used"


def test_a_fault_of_our_own_exporter_is_no_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BUILT_IN", (EntryPoint("ours", "no_such_module:run", GROUP),))
    with pytest.raises(ModuleNotFoundError):
        find_exporter("ours")


def test_our_exporters_are_what_we_ask_of_others() -> None:
    for point in BUILT_IN:
        assert registry._problem(point.load(), point.name) is None


def test_what_a_foreign_exporter_raises_names_its_package(packages: Path) -> None:
    install(packages, "other-exporters", {"flat": "flat_exporters:FLAT"})
    with pytest.raises(QrloraError) as caught, faults_named("flat"):
        raise KeyError("depth")
    assert str(caught.value) == (
        "format='flat': the exporter of other-exporters failed (KeyError: 'depth'); report it to that package"
    )
    assert caught.value.exit_code == 1 and isinstance(caught.value.__cause__, KeyError)
    for error in (InputError("a wrong option"), OSError(28, "no space"), MemoryError()):
        with pytest.raises(type(error)) as same, faults_named("flat"):
            raise error
        assert same.value is error
    with pytest.raises(KeyError), faults_named("onnx"):
        raise KeyError("ours")
