"""Arrays written one by one are the bytes that the library safetensors writes."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from qrlora_deploy.io.arrays import save_arrays


@pytest.mark.parametrize("metadata", [{"qrlora": '{"a":"\\"é\\\\ \\n"}'}, {"qrlora": ""}])
def test_bytes_are_those_of_the_library(tmp_path: Path, metadata: dict[str, str]) -> None:
    random = np.random.default_rng(0)
    shapes = {"b.Q": (3, 5), "a.R": (7,), "a.Q": (0, 4), "layer.10": (1, 1), "layer.9": ()}
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays |= {"a.half": arrays["a.R"].astype(np.float16), "c": arrays["b.Q"].astype(np.float64)}
    save_arrays(tmp_path / "a", arrays, metadata)
    assert (tmp_path / "a").read_bytes() == safetensors.numpy.save(arrays, metadata)


def test_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a must be contiguous and a float, not int64"):
        save_arrays(tmp_path / "a", {"a": np.zeros(2, np.int64)}, {})
