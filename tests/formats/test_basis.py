"""The basis file: what is written reads back, golden bytes stay readable, everything else is refused in one line."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qrlora_deploy.errors import FileFormatError, InputError, QrloraError
from qrlora_deploy.formats.basis import FORMAT, VERSIONS, Basis, BasisTarget, read_basis, write_basis
from qrlora_deploy.inspection.describe import describe
from qrlora_deploy.io.files import digest_file
from qrlora_deploy.io.sealing import METADATA_KEY
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from tests.forging import Change, forge
from tests.golden.make import BASIS_2_FILE, BASIS_FILE, golden_basis

SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
NAMES = st.lists(
    st.from_regex(r"[a-z][a-z0-9_]{0,5}(\.[0-9]{1,2})?", fullmatch=True), min_size=1, max_size=3, unique=True
)


@st.composite
def bases(draw: st.DrawFn) -> Basis:
    """Bases of any shape; the factors need not come from a factorization."""
    targets = []
    for name in draw(NAMES):
        out, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        rank = draw(st.integers(1, min(out, width)))
        shapes = ((out, rank), (rank, width), (min(out, width),))
        q, r, diagonal = (draw(hnp.arrays(np.float32, shape, elements=FINITE)) for shape in shapes)
        targets.append(BasisTarget(name, q, r, diagonal, draw(st.from_regex(r"[0-9a-f]{4}", fullmatch=True))))
    rule = draw(st.sampled_from([EnergyShare(), EnergyShare(1.0), FixedRank(3)]))
    base_name = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=6))
    return Basis(tuple(targets), base_name, rule, {"torch": "2"})


def assert_same(found: Basis, expected: Basis) -> None:
    assert found.names == expected.names and found.digest == expected.digest
    assert (found.base_name, found.rule, found.versions) == (expected.base_name, expected.rule, expected.versions)
    for one, other in zip(found.targets, expected.targets, strict=True):
        assert one.weight_digest == other.weight_digest
        for part in ("q", "r", "diagonal"):
            assert getattr(one, part).shape == getattr(other, part).shape
            assert getattr(one, part).tobytes() == getattr(other, part).tobytes()


def assert_refused(path: Path, message: str | None = None) -> None:
    """One line that names the file, and never another kind of exception."""
    with pytest.raises(FileFormatError, match=message) as caught:
        read_basis(path)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


@SAME_FOLDER
@given(basis=bases())
def test_write_then_read_is_the_identity(tmp_path: Path, basis: Basis) -> None:
    write_basis(basis, tmp_path / "basis.safetensors")
    assert_same(read_basis(tmp_path / "basis.safetensors"), basis)


@pytest.mark.parametrize("path", [BASIS_FILE, BASIS_2_FILE], ids=["version 1", "version 2"])
def test_golden_files_read_to_known_values(path: Path) -> None:
    basis = read_basis(path)
    assert_same(basis, golden_basis())
    assert basis.digest == "c633de833f9e4777ba7145a0c63619079662498bb7e8c9902901f9224e0a6005"
    assert basis.ranks == {"encoder.layer.0.query": 2, "encoder.layer.1.query": 1} and basis.total_rank == 3
    assert basis.targets[0].energy == pytest.approx(20 / 20.015625) and basis.targets[0].condition == 2
    assert basis.targets[1].energy == pytest.approx(0.9) and basis.targets[1].condition == 1


def test_golden_bytes_are_written_again(tmp_path: Path) -> None:
    write_basis(golden_basis(), tmp_path / "basis.safetensors")
    assert (tmp_path / "basis.safetensors").read_bytes() == BASIS_2_FILE.read_bytes()
    assert digest_file(BASIS_2_FILE) == "aab23bc51011460c8b12d01dc7df6ef41fd7044b40df57634a927c480a840549"
    assert digest_file(BASIS_FILE) == "43efaf5eb0ddbb5d58959d7aea726b7ec42127970c54982498a4b8c605878915"


def test_a_basis_with_a_rule_of_another_release_is_read_shown_and_kept(tmp_path: Path) -> None:
    rule = {"kind": "budget", "total": 3}
    path = forge(BASIS_2_FILE, tmp_path / "budget.safetensors", lambda m, t: m.update(rule=rule))
    basis = read_basis(path)
    assert basis.digest == golden_basis().digest and str(basis.rule) == 'budget {"total": 3}, unknown to this version'
    write_basis(basis, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert describe(path).facts["rule"] == str(basis.rule)


def test_digest_depends_on_values_and_order_alone() -> None:
    basis = golden_basis()
    other_facts = Basis(basis.targets, "elsewhere", FixedRank(2), {})
    assert other_facts.digest == basis.digest
    assert Basis(basis.targets[::-1], basis.base_name, basis.rule, {}).digest != basis.digest
    for part in ("q", "r", "diagonal"):
        fields = vars(basis.targets[0]) | {part: np.nextafter(getattr(basis.targets[0], part), np.float32(9))}
        changed = Basis((BasisTarget(**fields), basis.targets[1]), basis.base_name, basis.rule, {})
        assert changed.digest != basis.digest, part


def test_zero_weight_has_all_its_energy_and_no_condition() -> None:
    zero = np.zeros((2, 1), np.float32)
    target = BasisTarget("a", zero, zero.T, zero[:, 0], "")
    assert (target.energy, target.condition, target.rank) == (1.0, float("inf"), 1)


def test_values_are_cut_in_the_order_of_the_targets() -> None:
    parts = golden_basis().split(np.array([1, 2, 3], np.float32))
    assert {name: part.tolist() for name, part in parts.items()} == {
        "encoder.layer.0.query": [1, 2],
        "encoder.layer.1.query": [3],
    }


@pytest.mark.parametrize(("values", "found"), [(np.ones(4), "4"), (np.ones(0), "0"), (np.ones((3, 1)), "3x1")])
def test_values_of_another_length_are_refused(values: np.ndarray, found: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"expected 3 values (2+1), found {found}")):
        golden_basis().split(values)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_is_refused(tmp_path: Path, share: float) -> None:
    whole = BASIS_FILE.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[: int(share * len(whole))])
    assert_refused(path, "not a complete safetensors file")


@SAME_FOLDER
@given(data=st.data())
def test_a_changed_byte_never_gives_another_basis(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(BASIS_FILE.read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "changed.safetensors").write_bytes(whole)
    try:
        found = read_basis(tmp_path / "changed.safetensors")
    except QrloraError as error:
        assert "\n" not in str(error)
    else:
        # A space of the header, or the case of an escape: other bytes of the same meaning.
        assert_same(found, golden_basis())


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1])
def test_a_giant_header_takes_no_memory(tmp_path: Path, length: int) -> None:
    path = tmp_path / "giant.safetensors"
    path.write_bytes(struct.pack("<Q", length) + BASIS_FILE.read_bytes()[8:])
    assert_refused(path)


NAME = "encoder.layer.0.query"
FORGERIES: dict[str, tuple[Change, str]] = {
    "newer version": (lambda m, t: m.update(format_version=3), "version 3; this version reads 1 and 2; update qrlora-"),
    "version 0": (lambda m, t: m.update(format_version=0), "format version 0; this version reads 1 and 2$"),
    "no version": (lambda m, t: m.pop("format_version"), "format version None"),
    "other format": (lambda m, t: m.update(format="qrlora-coefficients"), "not a qrlora-basis file"),
    "wrong digest": (lambda m, t: m.update(basis_digest="0" * 64), "not those that the basis names"),
    "no digest": (lambda m, t: m.pop("basis_digest"), "basis_digest: Field required"),
    "digest of a number": (lambda m, t: m.update(basis_digest=5), "basis_digest: Input should be a valid string"),
    "version true": (lambda m, t: m.update(format_version=True), "format version True; this version reads 1 and 2"),
    "version 1.0": (lambda m, t: m.update(format_version=1.0), "format version 1.0; this version reads 1 and 2"),
    "rank true": (lambda m, t: m["targets"][1].update(rank=True), "targets.1.rank: Input should be a valid integer"),
    "rank 2.0": (lambda m, t: m["targets"][0].update(rank=2.0), "targets.0.rank: Input should be a valid integer"),
    "digest of null": (lambda m, t: m["targets"][0].update(weight_digest=None), "targets.0.weight_digest: Input"),
    "name of a list": (lambda m, t: m.update(base_name=["a"]), "base_name: Input should be a valid string"),
    "tau true": (lambda m, t: m.update(rule={"tau": True, "rank": None}), "rule.tau: Input should be a valid number"),
    "rank of text": (lambda m, t: m.update(rule={"tau": None, "rank": "4"}), "rule.rank: Input should be a valid int"),
    "versions of numbers": (lambda m, t: m["versions"].update(numpy=2), "versions.numpy: Input should be a valid str"),
    "long name": (lambda m, t: m["targets"][0].update(name="y" * 50_000), "the basis is incomplete, yyyy"),
    "targets swapped": (lambda m, t: m["targets"].reverse(), "not those that the basis names"),
    "target left out": (lambda m, t: m["targets"].pop(), "not those that the basis names"),
    "target twice": (lambda m, t: m["targets"].append(m["targets"][0]), "not those that the basis names"),
    "no targets": (lambda m, t: m.update(targets=[]), "not those that the basis names"),
    "targets null": (lambda m, t: m.update(targets=None), "incomplete"),
    "targets a number": (lambda m, t: m.update(targets=[3]), "incomplete"),
    "unknown target": (lambda m, t: m["targets"][0].update(name="x"), "incomplete"),
    "wrong rank": (lambda m, t: m["targets"][0].update(rank=1), "not of rank 1"),
    "no rule": (lambda m, t: m.pop("rule"), "incomplete"),
    "rule of text": (lambda m, t: m["rule"].update(tau="x"), "incomplete"),
    "rule out of range": (lambda m, t: m["rule"].update(tau=2), "tau must be in"),
    "rule of more": (lambda m, t: m["rule"].update(more=2), "incomplete"),
    "rule of neither": (lambda m, t: m["rule"].update(tau=None), "the rank rule has neither tau nor a rank"),
    "rule of both": (lambda m, t: m["rule"].update(rank=2), "tau and rank exclude each other"),
    "rule of version 2": (lambda m, t: m.update(rule={"kind": "energy-share", "tau": 0.5}), "incomplete"),
    "versions a list": (lambda m, t: m.update(versions=[1]), "incomplete"),
    "NaN": (lambda m, t: t[f"{NAME}.Q"].fill(np.nan), "not those|NaN"),
    "more tensors": (lambda m, t: t.update({"a.Q": np.ones((1, 1), np.float32)}), "not those that the basis names"),
    "strange name": (lambda m, t: t.update({"../a.Q": np.ones((1, 1), np.float32)}), "unexpected tensor"),
    "fp64": (lambda m, t: t.update({f"{NAME}.Q": np.ones((5, 2))}), "unexpected tensor"),
    "no column": (lambda m, t: t.update({f"{NAME}.Q": np.ones((5, 0), np.float32)}), "unexpected tensor"),
    "flat factor": (lambda m, t: t.update({f"{NAME}.R": np.ones(6, np.float32)}), "have shapes"),
    "short diagonal": (lambda m, t: t.update({f"{NAME}.diagonal": np.ones(2, np.float32)}), "diagonal of"),
}


FORGED_RULES: dict[str, tuple[object, str]] = {
    "none": (None, "rule: Input should be a valid dict"),
    "of version 1": ({"tau": 0.5, "rank": None}, "rule.kind must name a rank rule, such as energy-share"),
    "kind of a number": ({"kind": 1}, "rule.kind must name a rank rule"),
    "tau true": ({"kind": "energy-share", "tau": True}, "energy-share: tau: Input should be a valid number"),
    "tau of text": ({"kind": "energy-share", "tau": "x"}, "energy-share: tau: Input should be a valid number"),
    "out of range": ({"kind": "energy-share", "tau": 2}, "tau must be in"),
    "more": ({"kind": "fixed-rank", "rank": 2, "tau": 0.5}, "fixed-rank has the parameters rank, not rank, tau"),
}


@pytest.mark.parametrize("name", FORGED_RULES)
def test_forged_rules_are_refused(tmp_path: Path, name: str) -> None:
    rule, message = FORGED_RULES[name]
    assert_refused(forge(BASIS_2_FILE, tmp_path / "forged.safetensors", lambda m, t: m.update(rule=rule)), message)


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_files_are_refused(tmp_path: Path, name: str) -> None:
    change, message = FORGERIES[name]
    assert_refused(forge(BASIS_FILE, tmp_path / "forged.safetensors", change), message)


def test_consistent_nan_is_refused(tmp_path: Path) -> None:
    first = golden_basis().targets[0]
    bad = BasisTarget(first.name, np.full_like(first.q, np.inf), first.r, first.diagonal, "")
    write_basis(Basis((bad,), "b", EnergyShare(), {}), tmp_path / "bad.safetensors")
    assert_refused(tmp_path / "bad.safetensors", f"{first.name} holds NaN or Inf")


@pytest.mark.parametrize(
    "record",
    ['{"format_version":' + "1" * 5000 + "}", "[" * 994 + "]" * 994, '{"a":' * 990 + "1" + "}" * 990, '"\\ud800"', ""],
    ids=["5000 digits", "deep list", "deep object", "lone surrogate", "empty"],
)
def test_hostile_metadata_is_refused(tmp_path: Path, record: str) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(safetensors.numpy.save({"a.Q": np.ones((1, 1), np.float32)}, {METADATA_KEY: record}))
    assert_refused(path, "not a qrlora-basis file")


def test_metadata_nested_to_any_depth_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.safetensors"
    for depth in range(900, 1010, 3):
        nested = "[" * depth + "]" * depth
        record = f'{{"format":"{FORMAT}","format_version":{VERSIONS.current},"versions":{nested}}}'
        path.write_bytes(safetensors.numpy.save({"a.Q": np.ones((1, 1), np.float32)}, {METADATA_KEY: record}))
        assert_refused(path)
