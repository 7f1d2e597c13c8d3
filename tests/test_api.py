"""The Python API: light, lazy, with the command line's defaults, and each job the same as the command of its name."""

import ast
import dataclasses
import importlib
import inspect
import sys
import tempfile
import typing
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import qrlora_deploy as qr
from qrlora_deploy.api.options import FleetTrainOptions, TrainOptions, WarmupOptions
from qrlora_deploy.cli.group import cli
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import BasisMismatchError, InputError, QrloraError
from qrlora_deploy.formats.basis import Basis, write_basis
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients, write_coefficients
from qrlora_deploy.training.settings import TrainSettings, WarmupSettings
from tests.cli.running import run_here
from tests.test_imports import ROOT, loaded_by
from tests.tiny import LABELS, SENTENCES

SMALL: dict[str, Any] = {"epochs": 1, "batch_size": 4, "max_length": 16, "device": "cpu"}


def test_the_import_loads_nothing_but_the_package() -> None:
    found = loaded_by("import qrlora_deploy") - loaded_by("")
    assert found - sys.stdlib_module_names == {"qrlora_deploy"}


def test_what_serves_and_what_an_operator_needs_load_no_pytorch() -> None:
    names = ("open_predictor", "open_bundle", "SwitchableSession", "CustomerStore", "Basis", "Coefficients", "combine")
    found = loaded_by("import qrlora_deploy as qr\n" + "\n".join(f"qr.{name}" for name in names))
    assert "onnxruntime" in found
    assert found & {"torch", "transformers", "onnx", "datasets"} == set()


def test_type_checkers_read_the_names_that_there_are() -> None:
    tree = ast.parse((ROOT / "qrlora_deploy" / "__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    shown = {
        (f"{node.module}".removeprefix("qrlora_deploy."), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == {(module, name) for module, names in qr._PLACES.items() for name in names}
    assert sorted(qr.__all__) == sorted([name for _, name in shown] + ["__version__"])
    assert (ROOT / "qrlora_deploy" / "py.typed").is_file()


@pytest.mark.parametrize("name", qr.__all__)
def test_every_name_is_there_and_no_module_takes_its_place(name: str) -> None:
    importlib.import_module("qrlora_deploy.exporting.registry")  # a room of such a name would now hide the function
    assert getattr(qr, name) is not None
    assert not inspect.ismodule(getattr(qr, name))
    assert name in dir(qr)
    assert name == "__version__" or inspect.getdoc(getattr(qr, name))


def test_what_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(qr, "serve_everything")


JOBS: dict[str, tuple[Any, type | None]] = {
    "factorize": (qr.factorize, None),
    "warmup": (qr.warmup, WarmupSettings),
    "train": (qr.train, TrainSettings),
    "train-fleet": (qr.train_fleet, TrainSettings),
    "export": (qr.export, None),
    "predict": (qr.open_predictor, None),
}
OTHER_NAMES = {"format_name": "format", "bundle": "bundle"}
COMMAND_LINE_ONLY = {
    "as_json",
    "debug",
    "help",
    "output",  # of `factorize` and `train`: `save` takes it
    "merge",  # of `export`: coefficients say it
    "texts",  # and what else belongs to `Predictor.predict`
    "pairs",
    "requests",
    "names",
    "repl",
    "batch_size",
}


UNSET = click.Option(["--unset"]).default
"""What click calls the default of an option that has none."""


@pytest.mark.parametrize("command", JOBS)
def test_defaults_are_those_of_the_command_line(command: str) -> None:
    function, settings = JOBS[command]
    found = cli.get_command(click.Context(cli), command)
    assert found is not None
    own = {name: value.default for name, value in inspect.signature(function).parameters.items()}
    fields = {field.name: field.default for field in dataclasses.fields(settings)} if settings else {}
    seen = set()
    for parameter in found.params:
        name = OTHER_NAMES.get(str(parameter.name), str(parameter.name))
        known = fields | own
        if name in COMMAND_LINE_ONLY and (name not in known or command == "predict"):
            continue
        assert name in known, f"{command} has --{name}, {function.__name__} has no such argument"
        seen.add(name)
        given = parameter.get_default(click.Context(found))
        # An option without a default leaves the choice to the library; arguments have none on either side.
        if not parameter.required and given not in (None, (), UNSET):
            assert known[name] == given, f"{command}: {name}"
    assert len(seen) >= 3


@pytest.mark.parametrize(
    ("options", "settings", "left_out"),
    [
        (WarmupOptions, WarmupSettings, set()),
        (TrainOptions, TrainSettings, set()),
        (FleetTrainOptions, TrainSettings, {"dropout", "trunk_cache", "packing", "base_dtype"}),
    ],
)
def test_keywords_of_training_are_the_fields_of_the_settings(options: type, settings: type, left_out: set[str]) -> None:
    fields = typing.get_type_hints(settings)
    assert typing.get_type_hints(options) == {name: fields[name] for name in fields.keys() - left_out}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.tsv"
    lines = [f"{text}\t{LABELS[number % 4]}" for number, text in enumerate(SENTENCES * 2)]
    path.write_text("\n".join(["text\tlabel", *lines]) + "\n")
    return path


def test_factorize_gives_what_the_command_writes(tiny_base: Path, tmp_path: Path) -> None:
    basis = qr.factorize(tiny_base, targets="query", last_layers=1, rank=3)
    options = ("--target", "query", "--last-layers", 1, "--rank", 3, "-o", "b.safetensors")
    assert run_here("factorize", tiny_base, *options, cwd=tmp_path).code == 0
    written = qr.Basis.load(tmp_path / "b.safetensors")
    assert (basis.digest, basis.rule, basis.names) == (written.digest, written.rule, written.names)
    assert list(basis.ranks.values()) == [3]


def test_factorize_takes_a_rule_of_anybody(tiny_base: Path, tmp_path: Path) -> None:
    # The example of docs/factorization.md.
    page = (ROOT / "docs" / "factorization.md").read_text("utf-8")
    names: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], names)
    basis = qr.factorize(tiny_base, targets="query", rule=names["AboveShare"](0.02))
    assert basis.total_rank >= 2 and str(basis.rule) == "shares of 0.02 and more"
    basis.save(tmp_path / "b.safetensors")
    assert str(qr.Basis.load(tmp_path / "b.safetensors").rule) == 'above-share {"least": 0.02}, unknown to this version'
    with pytest.raises(InputError, match="rule, tau, rank and budget exclude each other"):
        qr.factorize(tiny_base, rule=names["AboveShare"](0.02), tau=0.5)


def test_factorize_refuses_what_excludes_each_other(tiny_base: Path) -> None:
    with pytest.raises(InputError, match="tau and rank exclude each other"):
        qr.factorize(tiny_base, tau=0.5, rank=3)


def test_a_basis_remembers_its_place_and_a_customer_writes_it_as_seen_from_its_own(
    tiny_base: Path, tiny_basis: Basis, rows: Path, tmp_path: Path
) -> None:
    basis = dataclasses.replace(tiny_basis, file=None)
    basis.save(str(tmp_path / "bases" / "basis.safetensors"))
    assert basis.file == tmp_path / "bases" / "basis.safetensors"
    customer = qr.train(tiny_base, basis, rows, **SMALL)
    customer.save(tmp_path / "customers" / "acme.safetensors")
    stored = qr.Coefficients.load(tmp_path / "customers" / "acme.safetensors")
    assert stored.basis_file == "../bases/basis.safetensors"
    assert stored.digest == customer.digest
    report = qr.merge(None, None, tmp_path / "customers" / "acme.safetensors", tmp_path / "merged")
    assert report.targets == tuple(tiny_basis.names)


def test_save_replaces_its_own_kind_alone(tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path) -> None:
    tiny_basis.save(tmp_path / "file.safetensors")
    before = (tmp_path / "file.safetensors").read_bytes()
    with pytest.raises(InputError, match="is no coefficients file"):
        tiny_customer.save(tmp_path / "file.safetensors")
    assert (tmp_path / "file.safetensors").read_bytes() == before
    dataclasses.replace(tiny_basis).save(tmp_path / "file.safetensors")


def test_train_gives_what_the_command_writes(
    tiny_base: Path, tiny_basis_file: Path, tiny_basis: Basis, rows: Path, tmp_path: Path
) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command = ("train", tiny_base, "--basis", tiny_basis_file, "--data", rows, "--eval", rows, *options)
    assert run_here(*command, "-o", "acme.safetensors", cwd=tmp_path).code == 0
    written = read_coefficients(tmp_path / "acme.safetensors")
    customer = qr.train(str(tiny_base), tiny_basis, qr.read_examples(rows), evaluation=str(rows), **SMALL)
    assert customer.digest == written.digest
    assert customer.training == written.training
    assert customer.values.any()


@pytest.mark.parametrize("wrong", [False, True])
def test_train_cleans_its_own_work_folder(
    wrong: bool,
    tiny_base: Path,
    tiny_basis: Basis,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    used = []

    def look(_what: str, done: int, total: int) -> None:
        used.extend(scratch.iterdir())
        if wrong and done == total:
            raise KeyboardInterrupt

    try:
        qr.train(tiny_base, tiny_basis, rows, **SMALL, progress=look)
    except KeyboardInterrupt:
        assert wrong
    assert used
    assert list(scratch.iterdir()) == []


def test_a_run_is_resumed_from_the_folder_that_is_named(
    tiny_base: Path, tiny_basis: Basis, rows: Path, tmp_path: Path
) -> None:
    settings = SMALL | {"epochs": 3}
    whole = qr.train(tiny_base, tiny_basis, rows, **settings)

    def stop(_what: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qr.train(tiny_base, tiny_basis, rows, **settings, work_dir=tmp_path / "run", progress=stop)
    resumed = qr.train(tiny_base, tiny_basis, rows, **settings, work_dir=str(tmp_path / "run"), resume=True)
    np.testing.assert_array_equal(resumed.values, whole.values)
    assert (tmp_path / "run").is_dir()


def test_resume_needs_the_folder(tiny_base: Path, tiny_basis: Basis, rows: Path) -> None:
    with pytest.raises(InputError, match="resume: give the work_dir"):
        qr.train(tiny_base, tiny_basis, rows, **SMALL, resume=True)


def test_a_fleet_trains_each_as_train_does(tiny_base: Path, tiny_basis: Basis, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for shift, name in enumerate(("one", "two")):
        lines = [f"{text}\t{LABELS[(number + shift) % 4]}" for number, text in enumerate(SENTENCES)]
        (data / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    basis = dataclasses.replace(tiny_basis, file=None)
    basis.save(tmp_path / "basis.safetensors")
    report = qr.train_fleet(tiny_base, tmp_path / "basis.safetensors", data, str(tmp_path / "fleet"), **SMALL)
    assert report.count("trained") == 2
    found = qr.Coefficients.load(tmp_path / "fleet" / "two.safetensors")
    assert found.basis_file == "../basis.safetensors"
    alone = qr.train(tiny_base, basis, data / "two.tsv", **SMALL)
    np.testing.assert_allclose(found.values, alone.values, rtol=1e-3, atol=1e-5)


def test_warmup_takes_paths_and_writes_a_base(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    report = qr.warmup(tiny_base, rows, tmp_path / "base", mode="head", **SMALL)
    assert report["mode"] == "head"
    assert qr.factorize(tmp_path / "base", targets=["value"]).total_rank > 0


def test_combine_takes_files_and_customers(tiny_customer: Coefficients, tiny_basis: Basis, tmp_path: Path) -> None:
    write_basis(tiny_basis, tmp_path / "basis.safetensors")
    stored = dataclasses.replace(tiny_customer, basis_file="basis.safetensors")
    write_coefficients(stored, tmp_path / "acme.safetensors")
    other = dataclasses.replace(tiny_customer, values=np.roll(tiny_customer.values, 1))
    both = qr.combine([tmp_path / "acme.safetensors", (other, -0.25)])
    expected = tiny_customer.values.astype(np.float64) - 0.25 * other.values.astype(np.float64)
    np.testing.assert_array_equal(both.values, expected.astype(np.float32))
    both.save(tmp_path / "folder" / "both.safetensors")
    assert qr.Coefficients.load(tmp_path / "folder" / "both.safetensors").basis_file == "../basis.safetensors"


def test_a_merge_is_taken_out_again(
    tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path
) -> None:
    qr.merge(tiny_base, tiny_basis, tiny_customer, tmp_path / "merged")
    assert qr.unmerge(tmp_path / "merged", tiny_basis, tiny_customer, tmp_path / "a", base=tiny_base).exact
    assert not qr.unmerge(tmp_path / "merged", tiny_basis, tiny_customer, tmp_path / "b").max_deviation > 1e-6


def test_objects_remember_no_place(
    tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"^basis: give a basis"):
        qr.merge(tiny_base, None, tiny_customer, tmp_path / "merged")
    with pytest.raises(InputError, match=r"^base: give a folder"):
        qr.merge(None, tiny_basis, tiny_customer, tmp_path / "merged")
    with pytest.raises(InputError, match="base and basis: give both"):
        qr.export(None, None, tmp_path / "bundle")
    foreign = qr.factorize(tiny_base, targets="key")
    with pytest.raises(BasisMismatchError):
        qr.merge(tiny_base, foreign, tiny_customer, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_switchable_bundle_answers_as_the_merged_one(
    switchable: Path, exported: Path, tiny_customer: Coefficients, tmp_path: Path
) -> None:
    tiny_customer.save(tmp_path / "customers" / "acme.safetensors")
    one = qr.open_predictor(str(exported)).predict(SENTENCES)
    answers = qr.open_predictor(switchable, customers=tmp_path / "customers").predict(
        SENTENCES, customers=["acme"] * len(SENTENCES)
    )
    expected, found = (np.array([answer.logits for answer in part]) for part in (one, answers))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert np.ptp(expected) > 0.5


def test_a_merged_bundle_takes_no_customers(exported: Path, switchable: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes no customers"):
        qr.open_predictor(exported, customers=tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        qr.open_predictor(switchable, customers=tmp_path / "nobody")


def test_export_of_a_customer_finds_what_its_file_remembers(
    tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path
) -> None:
    dataclasses.replace(tiny_basis).save(tmp_path / "basis.safetensors")
    stored = dataclasses.replace(tiny_customer, basis_file=str(tmp_path / "basis.safetensors"))
    stored.save(tmp_path / "acme.safetensors")
    record = qr.export(None, None, tmp_path / "bundle", coefficients=tmp_path / "acme.safetensors")
    assert record["kind"] == "merged"
    peft = qr.export(tiny_base, tiny_basis, tmp_path / "lora", coefficients=tiny_customer, format="peft")
    assert peft["coefficients_digest"] == tiny_customer.digest
    with pytest.raises(InputError, match="no option of format='peft'; it belongs to format='genai' and format='onnx'"):
        qr.export(tiny_base, tiny_basis, tmp_path / "x", coefficients=tiny_customer, format="peft", precision="fp16")


def test_examples_in_memory_are_taken_as_they_are(tiny_base: Path, tiny_basis: Basis) -> None:
    rows = Examples(list(SENTENCES), None, list(LABELS[:2]) * 3, "mine")
    assert qr.train(tiny_base, tiny_basis, rows, **SMALL).training["data_digest"] == rows.digest


def test_every_error_is_a_qrlora_error(tmp_path: Path) -> None:
    for call in (lambda: qr.factorize(tmp_path), lambda: qr.open_predictor(tmp_path), lambda: qr.Basis.load(tmp_path)):
        with pytest.raises(QrloraError):
            call()
