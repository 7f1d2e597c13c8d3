"""Records are read as they are written: no value changes its type, and every wrong field is named."""

import pytest
from pydantic import Field

from qrlora_deploy.errors import FileFormatError
from qrlora_deploy.io.strict import Record, from_json, from_value


class Part(Record):
    name: str
    rank: int = Field(gt=0)


class Whole(Record):
    share: float = 0.5
    sure: bool = False
    parts: list[Part] = []
    shape: tuple[int | str, ...] = ()


def test_what_is_right_is_read() -> None:
    found = from_json(Whole, '{"share": 1, "parts": [{"name": "a", "rank": 2}], "shape": ["batch", 3]}', "f.json")
    assert found == Whole(share=1.0, parts=[Part(name="a", rank=2)], shape=("batch", 3))
    assert from_value(Whole, {"share": 1, "parts": [{"name": "a", "rank": 2}]}, "f.toml").parts == found.parts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"share": true}', "share: Input should be a valid number"),
        ('{"share": "50"}', "share: Input should be a valid number"),
        ('{"share": NaN}', "share: Input should be a finite number"),
        ('{"sure": "yes"}', "sure: Input should be a valid boolean"),
        ('{"sure": 1}', "sure: Input should be a valid boolean"),
        ('{"parts": {"0": 1}}', "parts: Input should be a valid"),
        ('{"parts": [{"name": 5, "rank": 1.0}]}', "parts.0.name: Input should be a valid string; parts.0.rank: Input"),
        ('{"shape": [true]}', "shape.0"),
        ('{"shape": "ab"}', "shape: Input should be a valid"),
        ('{"a\\nb": 1}', r"'a\nb': Extra inputs are not permitted"),
        ("{", "Invalid JSON"),
        ("[" * 100_000, "Invalid JSON"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        from_json(Whole, text, "f.json is damaged")
    assert str(caught.value).startswith("f.json is damaged: ") and message in str(caught.value)


def test_a_long_name_leaves_room_for_the_others() -> None:
    with pytest.raises(FileFormatError) as caught:
        from_value(Whole, {"y" * 50_000: 1, "share": "x"}, "f.json")
    assert len(str(caught.value)) < 300 and "share: Input should be a valid number" in str(caught.value)
