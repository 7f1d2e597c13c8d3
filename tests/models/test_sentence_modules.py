"""How sentence-transformers' files say that an encoder pools."""

import json
from pathlib import Path
from typing import Any

import pytest

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.models.sentence_modules import read_pooling
from qrlora_deploy.tasks.pooling import Pooling

OLD = {"word_embedding_dimension": 32, "pooling_mode_max_tokens": False}


def save_modules(folder: Path, pooling: dict[str, Any], *kinds: str) -> Path:
    """Write `modules.json` and the config of the pooling, as sentence-transformers does."""
    known = [("", "Transformer"), ("1_Pooling", "Pooling"), *((f"{n}_{kind}", kind) for n, kind in enumerate(kinds, 2))]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(known)
    ]
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        (OLD | {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        (OLD | {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"embedding_dimension": 32, "pooling_mode": "mean"}, "mean"),
        ({"embedding_dimension": 32, "pooling_mode": "cls"}, "first"),
    ],
)
def test_the_mean_and_the_first_token_of_old_and_new_files(settings: dict[str, Any], mode: str, tmp_path: Path) -> None:
    assert read_pooling(save_modules(tmp_path / "plain", settings)) == Pooling(mode, False)
    assert read_pooling(save_modules(tmp_path / "unit", settings, "Normalize")) == Pooling(mode, True)


def test_without_the_files_it_is_the_mean_of_any_length(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == Pooling("mean", False)


@pytest.mark.parametrize(
    ("settings", "kinds", "message"),
    [
        ({"pooling_mode": "lasttoken"}, (), "pools by lasttoken; mean or cls is supported"),
        ({"pooling_mode": ["cls", "mean"]}, (), "pools by cls, mean; mean or cls is supported"),
        (OLD | {"pooling_mode_max_tokens": True}, (), "pools by max_tokens"),
        (OLD, (), "pools by nothing"),
        ({"pooling_mode": "mean"}, ("Dense",), "the module Dense is not supported"),
    ],
)
def test_what_a_bundle_would_not_compute_is_refused(
    settings: dict[str, Any], kinds: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        read_pooling(save_modules(tmp_path, settings, *kinds))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    save_modules(tmp_path, {"pooling_mode": "mean"})
    (tmp_path / "1_Pooling" / "config.json").write_text("[]", "utf-8")
    with pytest.raises(FileFormatError, match="1_Pooling/config.json must hold a JSON object"):
        read_pooling(tmp_path)
    modules = [{"type": "x.Pooling", "path": "../elsewhere"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules), "utf-8")
    with pytest.raises(FileFormatError, match="lies outside the folder"):
        read_pooling(tmp_path)
