"""A basis that may be larger than the memory: factors lie in files, and a large file is mapped."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from qrlora_deploy.cli import cli
from qrlora_deploy.errors import FileFormatError
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis, read_basis, write_basis
from qrlora_deploy.io import files
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from tests.tiny_decoder import save_decoder

WIDE = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 12, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(save_decoder(tmp_path_factory.mktemp("wide") / "base", **WIDE)))


def made(checkpoint: Checkpoint, scratch: Path | None) -> Basis:
    return factorize(checkpoint, choose_targets(checkpoint.skeleton()), EnergyShare(1.0), scratch=scratch)


def test_factors_in_files_take_the_memory_of_one_weight(wide: Checkpoint, tmp_path: Path) -> None:
    expected = made(wide, None)
    size = sum(target.q.nbytes + target.r.nbytes for target in expected.targets)
    tracemalloc.start()
    try:
        basis = made(wide, tmp_path)
        write_basis(basis, tmp_path / "basis.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 10e6 and peak < size / 4
    assert basis.digest == expected.digest
    write_basis(expected, tmp_path / "whole.safetensors")
    assert (tmp_path / "basis.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_large_file_is_mapped_and_is_checked_as_others_are(
    wide: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "basis.safetensors"
    write_basis(made(wide, None), file)
    copied = read_basis(file)
    monkeypatch.setattr(files, "MAPPED_BYTES", 1)
    tracemalloc.start()
    try:
        mapped = read_basis(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < file.stat().st_size / 4
    assert isinstance(mapped.targets[0].q, np.memmap) and not isinstance(copied.targets[0].q, np.memmap)
    for one, two in zip(mapped.targets, copied.targets, strict=True):
        assert all(np.array_equal(getattr(one, part), getattr(two, part)) for part in ("q", "r", "diagonal"))
    with file.open("r+b") as stream:
        stream.seek(-1000, 2)
        stream.write(b"\x01\x02\x03\x04")
    with pytest.raises(FileFormatError, match="content digest"):
        read_basis(file)


def test_the_command_leaves_the_basis_alone_beside_it(tmp_path: Path) -> None:
    base = save_decoder(tmp_path / "base")
    output = tmp_path / "out"
    output.mkdir()
    ran = CliRunner().invoke(cli, ["factorize", str(base), "-o", str(output / "basis.safetensors")])
    assert ran.exit_code == 0, ran.output
    assert [path.name for path in output.iterdir()] == ["basis.safetensors"]
    assert len(read_basis(output / "basis.safetensors").targets) == 14
