"""What a predictor is given: the wrong session, texts that are none, ids that the model has no row for, long lines."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.runtime import Buckets, Predictor, SwitchableSession, open_bundle, verify
from qrlora_deploy.runtime.bundle.manifest import UNSEALED
from qrlora_deploy.runtime.prediction import requests as request_file
from qrlora_deploy.runtime.prediction.requests import read_requests
from tests.forging import reseal
from tests.tiny import SENTENCES


@pytest.fixture
def session(switchable: Path) -> SwitchableSession:
    return SwitchableSession(open_bundle(switchable), threads=1)


def test_a_session_is_all_that_a_predictor_needs(session: SwitchableSession, switchable: Path) -> None:
    expected = Predictor(open_bundle(str(switchable)), threads=1).predict(SENTENCES)
    for predictor in (Predictor(session), Predictor(session.bundle, session=session)):
        assert predictor.switchable is session and predictor.bundle is session.bundle
        assert predictor.predict(SENTENCES) == expected


def test_a_session_never_answers_for_another_bundle(session: SwitchableSession, exported: Path) -> None:
    with pytest.raises(InputError, match="the session is of .*give Predictor the session alone"):
        Predictor(open_bundle(exported), session=session)


@pytest.mark.parametrize("options", [{"provider": "cpu"}, {"threads": 1}, {"buckets": Buckets((1,), (8,))}])
def test_what_a_session_has_already_is_refused(session: SwitchableSession, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))}: the session has its own"):
        Predictor(session, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "abc"}, "texts must be a list of texts, not str"),
        ({"texts": ["a"], "pairs": "b"}, "pairs must be a list of texts, not str"),
        ({"texts": ["a"], "customers": "b"}, "customers must be a list"),
        ({"texts": ["a", None]}, "text 1 is of the type NoneType"),
        ({"texts": ["a", 5]}, "text 1 is of the type int"),
        ({"texts": ["a", "b"], "pairs": ["a", None]}, "pair 1 is of the type NoneType"),
        ({"texts": ["a", "b \ud800 c"]}, "text 1 is not valid Unicode"),
        ({"texts": ["a", "\u4f60 \ud83d" + "b" * 2**20]}, "text 1 is not valid Unicode"),
        ({"texts": ["a"], "pairs": ["\udfff"]}, "pair 0 is not valid Unicode"),
        ({"texts": ["a"], "customers": [5]}, "customer 0 is of the type int"),
        ({"texts": 5}, "texts must be a list of texts, not int"),
    ],
)
def test_what_is_no_text_is_named(session: SwitchableSession, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Predictor(session).predict(**arguments)


def test_any_iterable_of_texts_is_answered(session: SwitchableSession) -> None:
    predictor = Predictor(session)
    expected = predictor.predict(list(SENTENCES))
    assert predictor.predict(text for text in SENTENCES) == expected
    assert predictor.predict(np.array(SENTENCES)) == expected


def test_ten_megabytes_answer_as_their_beginning(session: SwitchableSession) -> None:
    predictor = Predictor(session)
    assert predictor.predict(["play music " * 900_000]) == predictor.predict(["play music " * 100])


def test_a_token_without_a_row_is_named(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "bundle"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<ticket>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    reseal(folder)
    predictor = Predictor(open_bundle(folder), threads=1)
    assert predictor.predict(["hello"])
    with pytest.raises(InputError, match="text 1: the token '<ticket>' has the id .* rows for them"):
        predictor.predict(["hello", "see <ticket> 5", "play"])


def test_a_segment_without_a_row_is_named(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "bundle"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"type_vocab_size": 1}))
    reseal(folder)
    predictor = Predictor(open_bundle(folder), threads=1)
    assert predictor.predict(["hello"])
    with pytest.raises(InputError, match="text 0: a second text has the segment 1"):
        predictor.predict(["hello"], ["there"])


# --- The manifest -----------------------------------------------------------------------------------------------------

OTHERS: dict[str, Callable[[Any], Any]] = {
    "kind": lambda value: {"merged": "switchable", "switchable": "merged"}[value],
    "task": lambda _: "text-regression",
    "labels": lambda value: value[::-1],
    "thresholds": lambda value: [0.25] * 4 if not value else [],
    "precision": lambda _: "fp16",
    "accuracy_level": lambda value: 1 if value is None else None,
    "calibration": lambda _: {"method": "minmax", "rows": 1, "texts_digest": "0" * 64},
    "opset": lambda value: value + 1,
    "basis_digest": lambda _: "0" * 64,
    "coefficients_digest": lambda value: "0" * 64 if value else None,
    "base_digest": lambda _: "0" * 64,
    "total_rank": lambda value: value + 1,
    "head_labels": lambda value: value + 1,
    "head_features": lambda value: value + 1,
    "targets": lambda value: value[::-1],
    "inputs": lambda value: value[::-1],
    "outputs": lambda value: [value[0] | {"dtype": "float16"}],
    "max_length": lambda value: value - 1,
    "pad_token_id": lambda value: value + 1,
    "padding_side": lambda _: "left",
    "pad_token_type_id": lambda value: value + 1,
    "truncation_side": lambda _: "left",
}
"""Another value of every field that decides an answer."""


@pytest.mark.parametrize("kind", ["exported", "switchable"])
def test_no_field_that_decides_an_answer_can_change(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "bundle"))
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    assert set(OTHERS) | UNSEALED == set(record)
    verify(open_bundle(folder)).raise_if_failed()
    for name, other in OTHERS.items():
        value = other(record[name])
        if value == record[name]:
            continue
        path.write_text(json.dumps(record | {name: value}))
        with pytest.raises(FileFormatError):
            open_bundle(folder)


def test_an_older_bundle_opens_and_its_side_is_that_of_its_tokenizer(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "bundle"))
    unseal(folder)
    assert Predictor(open_bundle(folder), threads=1).predict(SENTENCES)
    reseal(folder, truncation_side="left")
    with pytest.raises(FileFormatError, match="truncation_side"):
        open_bundle(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "left"}))
    reseal(folder, truncation_side="right")
    with pytest.raises(FileFormatError, match=r"padding_side is not that of tokenizer_config\.json"):
        open_bundle(folder)


def unseal(folder: Path) -> None:
    """Take out of the reference what earlier versions did not write."""
    import safetensors
    import safetensors.numpy

    path = folder / "reference.safetensors"
    with safetensors.safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "sealed"}  # noqa: SIM118
        metadata = file.metadata()
    path.write_bytes(safetensors.numpy.save(tensors, metadata))
    reseal(folder)


def test_links_of_a_hub_cache_are_told_from_what_is_too_large(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).symlink_to(file)
    with pytest.raises(FileFormatError, match=r"manifest\.json is a link.*snapshot_download\(local_dir"):
        open_bundle(folder)
    (folder / "manifest.json").unlink()
    shutil.copy(exported / "manifest.json", folder / "manifest.json")
    with pytest.raises(FileFormatError, match=r"is a link.*snapshot_download\(local_dir"):
        open_bundle(folder)


# --- Files of requests ------------------------------------------------------------------------------------------------


def test_a_line_without_end_is_refused_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_file, "MAX_LINE_BYTES", 2**20)
    path = tmp_path / "requests.jsonl"
    path.write_text('\ufeff{"text": "a"}\n\n' + json.dumps({"text": "b" * (2**20 - 100)}) + "\n", encoding="utf-8")
    assert [len(request.text) for request in read_requests(path)] == [1, 2**20 - 100]
    path.write_text('{"text": "a"}\n' + json.dumps({"text": "b" * 2**20}), encoding="utf-8")
    with pytest.raises(FileFormatError, match="line 2 is longer than 1 MiB"):
        read_requests(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "customer": "acme", "customer": "bolt"}', "line 2: has the name 'customer' twice"),
        ('{"text": "a", "te\\u0078t": "b"}', "line 2: has the name 'text' twice"),
        ('{"text": "a", "customer": "../acme"}', "line 2: '../acme' is no customer id"),
        ('{"text": 5}', "line 2: text: Input should be a valid string"),
    ],
)
def test_a_request_that_can_be_read_in_two_ways_is_refused_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"text": "a", "n": ' + "9" * 4000 + "}\n" + line, encoding="utf-8")
    with pytest.raises(FileFormatError, match=message):
        read_requests(path)
