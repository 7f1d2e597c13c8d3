"""The lists of `.ci/` name tests that are there: pytest ends without a word of what is not, where it has workers."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["touches_transformers.txt", "serving_host.txt"])
def test_every_test_of_a_list_is_there(name: str) -> None:
    lines = (ROOT / ".ci" / name).read_text("utf-8").split()
    assert lines and [line for line in lines if not (ROOT / line.removeprefix("--ignore=")).exists()] == []
