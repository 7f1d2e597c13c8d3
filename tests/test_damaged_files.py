"""Whatever a file holds, its reader gives what is written there, or one line that says what is wrong with it.

Never another kind of exception, never a value of another type, never more than 500 characters.
"""

import json
import os
import random
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qrlora_deploy.bench.gate_file import EXAMPLE, read_gate
from qrlora_deploy.bench.report import Report, read_report, write_report
from qrlora_deploy.errors import QrloraError
from qrlora_deploy.formats.basis import read_basis
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients
from qrlora_deploy.formats.config_file import label_names, read_model_config
from qrlora_deploy.formats.provenance import FILE_NAME, MergedTarget, Provenance, read_provenance, write_provenance
from qrlora_deploy.inspection.describe import describe
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.bundle.external_data import external_locations
from qrlora_deploy.runtime.customers.packed_check import check_packed
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from qrlora_deploy.runtime.prediction.requests import read_requests
from qrlora_deploy.runtime.verification.reference import read_reference
from tests.bench.fixed import good_report
from tests.damaging import damage_value, damaged_bytes, damaged_header, damaged_json, same
from tests.forging import forge, reseal
from tests.golden.make import BASIS_2_FILE, BASIS_FILE, COEFFICIENTS_FILE

MANY = int(os.environ.get("QRLORA_DAMAGES", "150"))
"""Damages of each reader; tens of thousands take minutes."""

VERY_MANY = 2_000

Chance = random.Random


@dataclass(frozen=True)
class Reader:
    """A reader and the file that is damaged for it.

    Attributes:
        damage: writes the file anew, damaged by chance.
        read: reads it.
        right: whether what was read is what the file says.
        slow: how many times slower than the fastest ones it is, with the writing of its file.
    """

    damage: Callable[[Chance], Any]
    read: Callable[[], Any]
    right: Callable[[Any], bool]
    slow: int = 1


@dataclass(frozen=True)
class Sources:
    """What the readers' files are made from."""

    folder: Path
    bundle: Path
    customer: Coefficients


Make = Callable[[Sources], Reader]
MAKERS: dict[str, Make] = {}


def reader(make: Make) -> Make:
    """Register what makes a reader, by its name."""
    MAKERS[make.__name__] = make
    return make


@reader
def coefficients(sources: Sources) -> Reader:
    path, whole = sources.folder / "c.safetensors", COEFFICIENTS_FILE.read_bytes()
    digest = read_coefficients(COEFFICIENTS_FILE).digest

    def damage(chance: Chance) -> None:
        made = damaged_bytes(whole, chance) if chance.random() < 0.5 else damaged_header(whole, chance)
        path.write_bytes(made)

    return Reader(damage, lambda: read_coefficients(path), lambda found: found.digest == digest)


@reader
def sealed_coefficients(sources: Sources) -> Reader:
    """The metadata of another author, under a right seal."""
    path, written = sources.folder / "c.safetensors", {}

    def damage(chance: Chance) -> None:
        def change(metadata: dict[str, Any], tensors: Any) -> None:
            damage_value(metadata, chance, plain=True)
            written.clear()
            written.update(metadata)

        _sealed(COEFFICIENTS_FILE, path, change)

    def right(found: Coefficients) -> bool:
        names = ("basis_digest", "basis_file", "base_name", "base_digest", "task", "labels", "training")
        return all(same(getattr(found, name), written[name]) for name in names)

    return Reader(damage, lambda: read_coefficients(path), right, slow=3)


def _sealed(source: Path, path: Path, change: Any) -> None:
    try:
        forge(source, path, change)
    except ValueError:  # NaN, which no writer of ours writes
        path.write_bytes(b"")


@reader
def basis(sources: Sources) -> Reader:
    path, whole, digest = sources.folder / "b.safetensors", BASIS_FILE.read_bytes(), read_basis(BASIS_FILE).digest

    def damage(chance: Chance) -> None:
        path.write_bytes(damaged_bytes(whole, chance) if chance.random() < 0.5 else damaged_header(whole, chance))

    return Reader(damage, lambda: read_basis(path), lambda found: found.digest == digest)


@reader
def sealed_basis(sources: Sources) -> Reader:
    return _sealed_basis(sources, BASIS_2_FILE)


@reader
def sealed_basis_of_version_1(sources: Sources) -> Reader:
    return _sealed_basis(sources, BASIS_FILE)


def _sealed_basis(sources: Sources, golden: Path) -> Reader:
    path, written = sources.folder / "b.safetensors", {}

    def damage(chance: Chance) -> None:
        def change(metadata: dict[str, Any], tensors: Any) -> None:
            damage_value(metadata, chance, plain=True)
            written.clear()
            written.update(metadata)

        _sealed(golden, path, change)

    def right(found: Any) -> bool:
        targets = [{"name": t.name, "rank": t.rank, "weight_digest": t.weight_digest} for t in found.targets]
        rest = {"tau": None, "rank": None} if golden == BASIS_FILE else {"kind": found.rule.kind}
        rule = rest | found.rule.parameters
        known = {"base_name": found.base_name, "versions": found.versions, "rule": rule, "basis_digest": found.digest}
        kept = [{name: target[name] for name in targets[0]} for target in written["targets"]]
        return same(targets, kept) and all(same(value, written[name]) for name, value in known.items())

    return Reader(damage, lambda: read_basis(path), right, slow=3)


@reader
def packed(sources: Sources) -> Reader:
    path, whole = sources.folder / "p.safetensors", sources.folder / "whole.safetensors"
    customers = [
        (f"c{number}", replace(sources.customer, values=sources.customer.values * number)) for number in (1, 2)
    ]
    write_packed(customers, whole, open_bundle(sources.bundle).manifest)
    expected, content = check_packed(whole), whole.read_bytes()

    def damage(chance: Chance) -> None:
        path.write_bytes(damaged_bytes(content, chance) if chance.random() < 0.5 else damaged_header(content, chance))

    return Reader(damage, lambda: check_packed(path), lambda found: found == expected and path.read_bytes() == content)


@reader
def manifest(sources: Sources) -> Reader:
    bundle = Path(shutil.copytree(sources.bundle, sources.folder / "bundle"))
    path = bundle / "manifest.json"
    text = path.read_text()

    def right(found: Any) -> bool:
        record, written = found.manifest.model_dump(mode="json", exclude_unset=True), json.loads(path.read_text())
        return same(record, written)

    return Reader(
        lambda chance: path.write_bytes(damaged_json(text, chance)), lambda: open_bundle(bundle), right, slow=4
    )


@reader
def sealed_bundle(sources: Sources) -> Reader:
    """Its config or its reference of another author, under a right digest."""
    bundle = Path(shutil.copytree(sources.bundle, sources.folder / "sealed"))
    expected = open_bundle(bundle).manifest
    files = {name: (bundle / name).read_bytes() for name in ("config.json", "reference.safetensors")}

    def damage(chance: Chance) -> None:
        for name, content in files.items():
            (bundle / name).write_bytes(content)
        if chance.random() < 0.5:
            made = damaged_json(files["config.json"].decode(), chance)
            (bundle / "config.json").write_bytes(made)
        else:
            content = files["reference.safetensors"]
            made = damaged_header(content, chance) if chance.random() < 0.7 else damaged_bytes(content, chance)
            (bundle / "reference.safetensors").write_bytes(made)
        reseal(bundle)

    def right(found: Any) -> bool:
        return replace_files(found.manifest) == replace_files(expected)

    return Reader(damage, lambda: open_bundle(bundle), right, slow=6)


def replace_files(found: Any) -> dict[str, Any]:
    """A manifest without the digests of its files."""
    return dict(found.model_dump(exclude={"files"}))


@reader
def reference(sources: Sources) -> Reader:
    path, whole = sources.folder / "reference.safetensors", (sources.bundle / "reference.safetensors").read_bytes()

    def damage(chance: Chance) -> None:
        path.write_bytes(damaged_header(whole, chance) if chance.random() < 0.7 else damaged_bytes(whole, chance))

    def right(found: Any) -> bool:
        return all(isinstance(case.name, str) and isinstance(case.logits, np.ndarray) for case in found)

    return Reader(damage, lambda: read_reference(path), right, slow=2)


@reader
def graph(sources: Sources) -> Reader:
    """Where an ONNX file keeps its weights; ONNX Runtime never sees a damaged one."""
    whole, made = (sources.bundle / "model.onnx").read_bytes(), [b""]

    def damage(chance: Chance) -> None:
        made[0] = damaged_bytes(whole, chance)

    def right(found: Any) -> bool:
        return all(isinstance(location, str) for location in found)

    return Reader(damage, lambda: external_locations(made[0]), right, slow=6)


@reader
def provenance(sources: Sources) -> Reader:
    path = sources.folder / FILE_NAME
    target = MergedTarget("a.query", "a.query.weight", 2, "0" * 64)
    made = Provenance(
        *("base", "1" * 64, "2" * 64, "3" * 64, "text-classification"),
        labels=("no", "yes"),
        head=("classifier.weight",),
        base_labels={"id2label": {"0": "a"}, "num_labels": 1},
        targets=(target, replace(target, name="b")),
        rounding={"max_update": 0.25, "unchanged_share": 0.0},
        training={"seed": 7, "metrics": {"accuracy": 0.5}},
        versions={"torch": "2"},
    )
    write_provenance(made, sources.folder)
    text = path.read_text()

    def right(found: Provenance) -> bool:
        written = json.loads(path.read_text())
        kept = {name: value for name, value in written.items() if name not in ("format", "format_version")}
        defaults = {"training": {}, "versions": {}}
        return same(json.loads(json.dumps(asdict(found))), defaults | kept)

    return Reader(
        lambda chance: path.write_bytes(damaged_json(text, chance)), lambda: read_provenance(sources.folder), right
    )


@reader
def gate(sources: Sources) -> Reader:
    path = sources.folder / "gate.toml"
    tokens = ("true", '"50"', "50", "-1", "1e999", "nan", "inf", "[]", "{}", '""', "1" * 5000, "[" * 3000, "1979-05-27")

    def damage(chance: Chance) -> None:
        lines = EXAMPLE.splitlines()
        if chance.random() < 0.3:
            path.write_bytes(damaged_bytes(EXAMPLE.encode(), chance))
            return
        number = chance.choice([number for number, line in enumerate(lines) if " = " in line])
        name = lines[number].removeprefix("# ").partition(" = ")[0]
        lines[number] = f"{name} = {chance.choice(tokens)}"
        path.write_text("\n".join(lines))

    def right(found: Any) -> bool:
        return same(found.model_dump(exclude_unset=True), tomllib.loads(path.read_text()))

    return Reader(damage, lambda: read_gate(path), right)


@reader
def report(sources: Sources) -> Reader:
    path = sources.folder / "report.json"
    made: Report = good_report()
    shorter = [item.model_copy(update={"samples": item.samples[:4]}) for item in made.measurements]
    write_report(made.model_copy(update={"measurements": shorter}), path)
    text = path.read_text()

    def right(found: Report) -> bool:
        return same(found.model_dump(mode="json", exclude_unset=True), json.loads(path.read_text()))

    return Reader(lambda chance: path.write_bytes(damaged_json(text, chance)), lambda: read_report(path), right)


@reader
def requests(sources: Sources) -> Reader:
    path = sources.folder / "requests.jsonl"
    lines = [json.dumps({"text": f"text {number}", "customer": "acme", "pair": "b"}) for number in range(4)]

    def damage(chance: Chance) -> None:
        if chance.random() < 0.3:
            path.write_bytes(damaged_bytes("\n".join(lines).encode(), chance))
            return
        made = [line.encode() for line in lines]
        number = chance.randrange(len(made))
        made[number] = damaged_json(lines[number], chance)
        path.write_bytes(b"\n".join(made))

    def right(found: Any) -> bool:
        records = [json.loads(line) for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
        names = ("text", "pair", "customer")
        return len(found) == len(records) and all(
            same(getattr(request, name), record.get(name))
            for request, record in zip(found, records, strict=True)
            for name in names
        )

    return Reader(damage, lambda: read_requests(path), right)


@reader
def config(sources: Sources) -> Reader:
    """As `inspect` reads it."""
    path, text = sources.folder / "config.json", (sources.bundle / "config.json").read_text()

    def read() -> Any:
        found = read_model_config(path)
        return found, label_names(found, path)

    def right(found: Any) -> bool:
        written = json.loads(path.read_text())
        return all(same(value, written[name]) for name, value in found[0].model_dump(exclude_unset=True).items())

    return Reader(lambda chance: path.write_bytes(damaged_json(text, chance)), read, right)


@reader
def what_it_is(sources: Sources) -> Reader:
    """`inspect` of a file that says itself what it is."""
    path = sources.folder / "it.safetensors"
    whole = [BASIS_FILE.read_bytes(), COEFFICIENTS_FILE.read_bytes()]

    def damage(chance: Chance) -> None:
        content = chance.choice(whole)
        path.write_bytes(damaged_header(content, chance) if chance.random() < 0.7 else damaged_bytes(content, chance))

    return Reader(damage, lambda: describe(path), lambda found: found.kind in ("basis", "coefficients"))


@pytest.fixture(scope="module")
def sources(switchable: Path, tiny_customer: Coefficients, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("damaged"), switchable, tiny_customer)


def read_damaged(made: Reader, seeds: Iterator[int] | range) -> dict[str, int]:
    """Damage and read so many times; how many were refused and how many read."""
    ended = {"refused": 0, "read": 0}
    for seed in seeds:
        made.damage(Chance(seed))
        try:
            found = made.read()
        except QrloraError as error:
            message = str(error)
            assert 0 < len(message) < 500 and message.isprintable() and error.exit_code == 2, (seed, message[:600])
            ended["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        else:
            assert made.right(found), (seed, found)
            ended["read"] += 1
    return ended


@pytest.mark.parametrize("name", MAKERS)
def test_a_damaged_file_is_refused_in_one_line_or_read_as_it_is(sources: Sources, name: str) -> None:
    made = MAKERS[name](replace(sources, folder=_folder(sources, name)))
    ended = read_damaged(made, range(MANY // made.slow))
    assert ended["refused"] > ended["read"] / 10, ended


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_very_many_damaged_files(sources: Sources, name: str) -> None:
    made = MAKERS[name](replace(sources, folder=_folder(sources, f"very-{name}")))
    read_damaged(made, range(10**6, 10**6 + max(VERY_MANY, MANY) // made.slow))


def _folder(sources: Sources, name: str) -> Path:
    folder = sources.folder / name
    folder.mkdir()
    return folder
