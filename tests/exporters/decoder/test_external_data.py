"""The file of a decoder's weights."""

import errno
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from exporters.onnx.decoder.external_data import ExternalData


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "weights").symlink_to("/dev/full")
    with suppress(OSError), ExternalData(tmp_path, "weights") as data:
        with pytest.raises(OSError, match="No space left on device") as caught:
            data.write("weight", lambda: np.ones(2**20, np.float32))
        assert caught.value.errno == errno.ENOSPC
