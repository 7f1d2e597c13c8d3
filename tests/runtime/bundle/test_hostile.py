"""What serving reads may be anything: it is refused in one line, or the answers are those of the untouched files.

Never another kind of exception, never another customer's numbers, never the end of the process.
"""

import copy
import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qrlora_deploy.errors import FileFormatError, InputError, QrloraError
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.formats.customer_files import read_customer
from qrlora_deploy.io.files import digest_file
from qrlora_deploy.runtime import Predictor, SwitchableSession, open_bundle, verify
from tests.forging import reseal
from tests.tiny import SENTENCES

ROOT = Path(__file__).parents[3]
TEXTS = ("play music", *SENTENCES, "play some music " * 40)
"""Of different lengths, so that rows are padded; the last one is longer than the model can take."""
OWNERS = ("acme", None) * 4

hypothesis = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_one_line(error: QrloraError) -> None:
    assert str(error).isprintable() and 0 < len(str(error)) < 2000, str(error)[:300]


def unless_refused(action: Callable[[], Any]) -> Any:
    """What `action` gives; None where it is refused in one line. Any other exception fails the test."""
    try:
        return action()
    except QrloraError as error:
        assert_one_line(error)
        return None


def predictor_of(folder: Path, acme: Path | None = None) -> Predictor:
    predictor = Predictor(open_bundle(folder), threads=1)
    if predictor.switchable is not None and acme is not None:
        predictor.switchable.load("acme", acme)
    return predictor


def answers(folder: Path, acme: Path) -> Any:
    """Labels, scores and logits of the texts, which compare bit for bit."""
    predictor = predictor_of(folder, acme)
    return predictor.predict(TEXTS, customers=OWNERS if predictor.switchable is not None else None)


@pytest.fixture
def bundle(switchable: Path, tmp_path: Path) -> Path:
    """A copy of the switchable bundle."""
    return Path(shutil.copytree(switchable, tmp_path / "bundle"))


# --- A customer's file ------------------------------------------------------------------------------------------------


class Customers:
    """A live session whose acme has an old version, and the files of a new one and of another customer."""

    def __init__(self, bundle: Path, customer: Coefficients, folder: Path) -> None:
        self.paths = {name: folder / f"{name}.safetensors" for name in ("old", "new", "bolt", "damaged")}
        for name, factor in (("old", 1.0), ("new", 0.5), ("bolt", -1.0)):
            write_coefficients(replace(customer, values=customer.values * np.float32(factor)), self.paths[name])
        self.predictor = predictor_of(bundle)
        self.answers = {name: self.load(name) for name in ("bolt", "new", "old")}

    @property
    def session(self) -> SwitchableSession:
        assert self.predictor.switchable is not None
        return self.predictor.switchable

    def load(self, name: str) -> Any:
        self.session.load("acme", self.paths[name])
        return self.ask()

    def ask(self) -> Any:
        return self.predictor.predict(TEXTS[:3], customers=["acme", None, "acme"])


@pytest.fixture(scope="module")
def customers(switchable: Path, tiny_customer: Coefficients, tmp_path_factory: pytest.TempPathFactory) -> Customers:
    return Customers(switchable, tiny_customer, tmp_path_factory.mktemp("customers"))


@st.composite
def damages(draw: st.DrawFn, whole: bytes, other: bytes) -> bytes:
    """`whole` with bytes cut out, changed, put in, or taken from `other`."""
    first, last = sorted((draw(st.integers(0, len(whole))), draw(st.integers(0, len(whole)))))
    kind = draw(st.sampled_from(("cut", "change", "insert", "splice", "end", "number")))
    if kind == "cut":
        return whole[:first] + whole[last:]
    if kind == "end":
        return whole[:first]
    if kind == "insert":
        return whole[:first] + draw(st.binary(max_size=16)) + whole[first:]
    if kind == "splice":
        return whole[:first] + other[first:last] + whole[last:]
    if kind == "number":
        # The length of the header, by which everything else is found.
        return struct.pack("<Q", draw(st.integers(0, 2**64 - 1))) + whole[8:]
    changed = bytearray(whole)
    for place in draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        changed[place] ^= draw(st.integers(1, 255))
    return bytes(changed)


@hypothesis
@given(data=st.data())
def test_a_damaged_file_never_becomes_a_version(customers: Customers, data: st.DataObject) -> None:
    whole, other = (customers.paths[name].read_bytes() for name in ("new", "bolt"))
    damaged = data.draw(damages(whole, other))
    assume(damaged != other)
    customers.paths["damaged"].write_bytes(damaged)
    loaded = unless_refused(lambda: customers.load("damaged"))
    if loaded is None:
        assert customers.ask() == customers.answers["old"]
    else:
        assert loaded == customers.answers["new"]
        assert customers.load("old") == customers.answers["old"]


def test_a_giant_file_with_holes_takes_no_memory(customers: Customers, tmp_path: Path) -> None:
    giant = tmp_path / "giant.safetensors"
    with giant.open("wb") as file:
        file.write(customers.paths["new"].read_bytes())
        file.truncate(2**40)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="too large for a customer"):
            read_customer(tmp_path, "giant")
        with pytest.raises(InputError, match="too large for a customer"):
            customers.session.load("acme", giant)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    assert customers.ask() == customers.answers["old"]


# --- The manifest -----------------------------------------------------------------------------------------------------

DEEP, DEEPER = "@deep", "@deeper"
"""Stand for nested lists, which are put in as text: Python's own writer cannot nest so deep."""

ODD_TEXTS = ("", "../x", "/etc/passwd", "a\nb", "\u2028", "\0", "x" * 300, "y" * 50_000, "left", "merged", "input_ids")
ODD_NUMBERS = (-1, 0, 1, 2, 3, 6, 7, 8, 9, 16, 33, 1.5, 2**31, 2**63, 10**30, 10**4200, float("nan"), float("inf"))
ODD = st.sampled_from((*ODD_TEXTS, *ODD_NUMBERS, None, True, [], {}, [[]], {"a": 1}, DEEP, DEEPER))


def places(record: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to everything in a JSON value."""
    items = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def at(record: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        record = record[key]
    return record


@st.composite
def changes(draw: st.DrawFn, record: dict[str, Any]) -> None:
    """Change one thing in `record`, in place."""
    ways = places(record)[1:]
    *path, key = draw(st.sampled_from(ways), label="place")
    parent = at(record, tuple(path))
    kind = draw(st.sampled_from(("replace", "replace", "copy", "remove", "add", "turn", "step")), label="kind")
    if kind == "replace":
        parent[key] = draw(ODD, label="value")
    elif kind == "copy":
        parent[key] = copy.deepcopy(at(record, draw(st.sampled_from(ways), label="from")))
    elif kind == "remove":
        del parent[key]
    elif kind == "step" and isinstance(parent[key], int):
        parent[key] += draw(st.sampled_from((-1, 1)))
    elif kind == "turn" and isinstance(parent[key], list):
        parent[key] = draw(st.permutations(parent[key]))
    elif isinstance(parent, dict):
        parent[draw(st.sampled_from(ODD_TEXTS), label="name")] = draw(ODD, label="value")
    else:
        parent.insert(draw(st.integers(0, len(parent))), draw(ODD, label="value"))


def text_of(record: Any) -> str:
    text = json.dumps(record)
    for name, depth in ((DEEP, 300), (DEEPER, 100_000)):
        text = text.replace(json.dumps(name), "[" * depth + "]" * depth)
    return text


@pytest.fixture(scope="module")
def changeable(switchable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose manifest is written again and again."""
    return Path(shutil.copytree(switchable, tmp_path_factory.mktemp("changeable") / "bundle"))


@pytest.fixture(scope="module")
def expected(switchable: Path, tiny_customer_file: Path) -> Any:
    """The answers of the untouched switchable bundle."""
    return answers(switchable, tiny_customer_file)


@hypothesis
@given(data=st.data())
def test_a_changed_manifest_is_refused_or_harmless(
    changeable: Path, switchable: Path, expected: Any, tiny_customer_file: Path, data: st.DataObject
) -> None:
    record = json.loads((switchable / "manifest.json").read_text())
    for _ in range(data.draw(st.integers(1, 2), label="changes")):
        data.draw(changes(record))
    (changeable / "manifest.json").write_text(text_of(record), "utf-8")
    found = unless_refused(lambda: answers(changeable, tiny_customer_file))
    if found is not None:
        assert found == expected


def change_labels(record: dict[str, Any]) -> None:
    record["labels"] = record["labels"][::-1]


def change_task(record: dict[str, Any]) -> None:
    record["task"] = "text-regression"


def permute_ranks(record: dict[str, Any]) -> None:
    record["targets"].insert(0, record["targets"].pop())


def shift_ranks(record: dict[str, Any]) -> None:
    """The same width, the same number of coefficients: only the sealed reference knows better."""
    record["targets"][0]["rank"] += 1
    record["targets"][3]["rank"] -= 1


def shorten(record: dict[str, Any]) -> None:
    record["max_length"] -= 1


def pad_otherwise(record: dict[str, Any]) -> None:
    record["pad_token_id"] = 4


def pad_types_otherwise(record: dict[str, Any]) -> None:
    record["pad_token_type_id"] = 1


def giant_head(record: dict[str, Any]) -> None:
    """Consistent in itself, so only what is sealed shows that this table would not fit any memory."""
    record["head_labels"] = 2**40
    record["inputs"][4]["shape"][1] = 2**40 * 33
    record["outputs"][0]["shape"][1] = 2**40


def giant_ranks(record: dict[str, Any]) -> None:
    record["targets"][0] |= {"rank": 2**60, "padded_rank": 2**60}
    record["total_rank"] = 2**60 + 26
    record["inputs"][3]["shape"][1] = 2**60 + 40


def no_head(record: dict[str, Any]) -> None:
    record |= {"head_labels": 0, "head_features": 0}


def other_head(record: dict[str, Any]) -> None:
    """9 * (21 + 1) columns are as many as 6 * (32 + 1)."""
    record |= {"head_labels": 9, "head_features": 21}
    record["outputs"][0]["shape"][1] = 9


def two_inputs_of_one_name(record: dict[str, Any]) -> None:
    record["inputs"].append(record["inputs"][0] | {"shape": [1, 2]})


def long_name(record: dict[str, Any]) -> None:
    record["files"]["x" * 300] = "0" * 64


def name_of_two_lines(record: dict[str, Any]) -> None:
    record["files"]["a\nb"] = "0" * 64


def key_of_two_lines(record: dict[str, Any]) -> None:
    record["a\nb"] = 1


def no_config(record: dict[str, Any]) -> None:
    del record["files"]["config.json"]


MANIFESTS: dict[Callable[[dict[str, Any]], None], str] = {
    change_labels: "labels are not those of config.json",
    change_task: "task is not that of config.json",
    permute_ranks: "ranks are not those of reference.safetensors",
    shift_ranks: "ranks are not those of reference.safetensors",
    shorten: "max_length is not as in reference",
    pad_otherwise: "padding is not that of reference.safetensors",
    pad_types_otherwise: "padding is not that of reference.safetensors",
    giant_head: "head is not that of reference.safetensors",
    giant_ranks: "ranks are not those of reference.safetensors",
    no_head: "inputs do not fit the ranks and the head",
    other_head: "holds no head",
    two_inputs_of_one_name: "two inputs have one name",
    long_name: "xxx... ",
    name_of_two_lines: r"'a\\nb' is missing",
    key_of_two_lines: r"'a\\nb': Extra inputs",
    no_config: "does not list config.json",
}


@pytest.mark.parametrize("change", MANIFESTS, ids=lambda change: change.__name__)
def test_what_the_manifest_says_is_held_against_the_sealed_files(
    bundle: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    record = json.loads((bundle / "manifest.json").read_text())
    change(record)
    (bundle / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(FileFormatError, match=MANIFESTS[change]) as caught:
        open_bundle(bundle)
    assert_one_line(caught.value)


# --- Files of another bundle ------------------------------------------------------------------------------------------

EXCHANGED = ("model.onnx", "model.onnx.data", "base_head.safetensors", "reference.safetensors", "tokenizer.json")
PAIRS = {
    "merged into switchable": ("switchable", "exported"),
    "switchable into merged": ("exported", "switchable"),
    "another basis": ("switchable", "stranger"),
}


@pytest.fixture(scope="module")
def stranger(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A switchable bundle of the same shapes: all weights of its base are other ones, and so is its basis."""
    pytest.importorskip("torch", reason="needs PyTorch to make another base's bundle")
    from exporters.onnx import export_switchable
    from exporters.onnx.options import OnnxOptions
    from qrlora_deploy.data.examples import Examples
    from qrlora_deploy.exporting.job import ExportJob
    from qrlora_deploy.factorization.from_checkpoint import factorize
    from qrlora_deploy.models.checkpoint import open_checkpoint
    from qrlora_deploy.models.targets import choose_targets
    from qrlora_deploy.rank_rules.energy_share import EnergyShare

    folder = tmp_path_factory.mktemp("stranger")
    base = Path(shutil.copytree(tiny_base, folder / "base"))
    weights = safetensors.numpy.load_file(base / "model.safetensors")
    changed = {name: (array * np.float32(1.25)).astype(np.float32) for name, array in weights.items()}
    safetensors.numpy.save_file(changed, base / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(base))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton(), ("query", "value")), EnergyShare(0.5))
    examples = Examples(list(SENTENCES), None, ["travel"] * len(SENTENCES), "sentences")
    export_switchable(ExportJob(checkpoint, basis, folder / "bundle"), OnnxOptions(data=examples, head_labels=6))
    return folder / "bundle"


@pytest.mark.parametrize("sealed_again", [False, True], ids=["as it is", "sealed again"])
@pytest.mark.parametrize("name", EXCHANGED)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_file_of_another_bundle_is_refused_or_harmless(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_customer_file: Path, pair: str, name: str, sealed_again: bool
) -> None:
    here, there = (request.getfixturevalue(fixture) for fixture in PAIRS[pair])
    if not (there / name).exists():
        pytest.skip(f"a merged bundle has no {name}")
    folder = Path(shutil.copytree(here, tmp_path / "mixed"))
    shutil.copy(there / name, folder / name)
    same = (here / name).exists() and digest_file(here / name) == digest_file(there / name)
    if sealed_again:
        reseal(folder)
    found = unless_refused(lambda: answers(folder, tiny_customer_file))
    if found is None:
        assert not same
    elif found != answers(here, tiny_customer_file):
        # Weights of the same shapes under seals that are right: another model, which `verify` tells apart.
        assert sealed_again and name in ("model.onnx", "model.onnx.data")
        assert unless_refused(lambda: verify(open_bundle(folder), threads=1).raise_if_failed() or True) is None
    elif not sealed_again:
        assert same or name not in json.loads((here / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("name", ["reference.safetensors", "base_head.safetensors"])
@pytest.mark.parametrize("content", [struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2) + b"{}", b"", b"\0" * 64])
def test_hostile_tensors_under_a_right_seal_are_refused(bundle: Path, name: str, content: bytes) -> None:
    (bundle / name).write_bytes(content)
    reseal(bundle)
    with pytest.raises(FileFormatError, match=name) as caught:
        open_bundle(bundle)
    assert_one_line(caught.value)


@pytest.mark.parametrize(
    "content", ["", "[1]", "[" * 100_000, "{}", '{"id2label": 3}', '{"id2label": {"a": "b"}}', "1"]
)
def test_a_hostile_config_under_a_right_seal_is_refused(bundle: Path, content: str) -> None:
    (bundle / "config.json").write_text(content)
    reseal(bundle)
    with pytest.raises(FileFormatError, match="config.json") as caught:
        open_bundle(bundle)
    assert_one_line(caught.value)
