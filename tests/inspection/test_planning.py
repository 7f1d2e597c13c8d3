"""A plan against the things themselves: models, tables, files, and bytes counted by hand."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
import transformers
from onnx import numpy_helper

from benchmarks.planning_figures import figures
from exporters.onnx.export import export_switchable
from exporters.onnx.options import OnnxOptions
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import BasisMismatchError, InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis, write_basis
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.inspection.adapted_layers import linear_layers
from qrlora_deploy.inspection.planning import DISK_BLOCK, Plan, make_plan
from qrlora_deploy.inspection.recorded import FILE, Recorded, recorded
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.models.weight_files import read_headers, weight_files
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.runtime import SwitchableSession, open_bundle
from qrlora_deploy.runtime.bundle.row_layout import TABLE
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from tests.cli.running import run_here
from tests.test_imports import loaded_by

RATE = {
    "device": "NVIDIA Z9 40GB",
    "model": "a base",
    "block_weights": 7168,
    "coefficients": 10,
    "precision": "fp16",
    "cuda_graph": True,
    "batch": 4,
    "length": 8,
    "rows_per_s": 1000.0,
    "date": "2020-01-01",
    "record": "z9.json",
}
"""Half the weights of the linear layers of `tiny_base`: 2 blocks of 4 x 32 x 32 and 2 x 32 x 48."""

OTHER_RATE = RATE | {"device": "8 CPU cores", "rows_per_s": 10.0, "block_weights": 28672}
"""Of a base twice as large."""

KNOWN = Recorded.model_validate(
    {
        "rates": [RATE, OTHER_RATE],
        "ranks": [
            {"model": "one", "coefficients": 1, "directions": 4, "date": "", "record": ""},
            {"model": "other", "coefficients": 2, "directions": 10, "date": "", "record": ""},
        ],
        "customer_file": {"size_bytes": 1400, "coefficients": 100, "date": "", "record": ""},
    }
)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures with answers that can be counted by hand."""
    monkeypatch.setattr("qrlora_deploy.inspection.planning.recorded", lambda: KNOWN)


def sizes(plan: Plan, where: str) -> dict[str, dict[str, int]]:
    return {size.name: dict(size.size_bytes) for size in plan.sizes if size.where == where}


FAMILIES: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
        )
    ),
    "mpnet": lambda: transformers.MPNetForSequenceClassification(
        transformers.MPNetConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
        )
    ),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(vocab_size=9, dim=8, n_layers=2, n_heads=2, hidden_dim=12)
    ),
    "deberta-v2": lambda: transformers.DebertaV2ForSequenceClassification(
        transformers.DebertaV2Config(
            vocab_size=9,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
        )
    ),
    "gpt2": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2, n_positions=8)
    ),
    "llama": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
        )
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_the_headers_are_those_that_are_factorized(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path)
    found = linear_layers(read_headers(weight_files(tmp_path)), tmp_path / "config.json")
    chosen = choose_targets(model)
    assert set(found) == set(chosen)
    assert all(tuple(model.get_parameter(f"{name}.weight").shape) == shape for name, shape in found.items())


def test_an_estimate_counted_by_hand(tiny_base: Path, known: None) -> None:
    plan = make_plan(tiny_base, 999)
    # A quarter of 32 directions of each of 12 layers, which needs no padding.
    assert (plan.layers, plan.coefficients, plan.table_width) == (12, 96, 96)
    assert "tau 0.5 keeps 25% of the directions at most of one, other" in plan.basis_from
    memory, disk = sizes(plan, "memory"), sizes(plan, "disk")
    numbers = sum(weight.numel() for weight in open_checkpoint(str(tiny_base)).load_model().parameters())
    assert memory["base"] == {"fp32": 4 * numbers, "fp16": 2 * numbers}
    factors = 2 * 8 * (4 * (32 + 32) + 2 * (32 + 48))
    assert memory["basis"] == {"fp32": 4 * factors, "fp16": 2 * factors}
    assert memory["coefficient table"] == {"fp32": 1000 * 96 * 4, "fp16": 1000 * 96 * 2}
    assert disk["one customer's file"] == {"fp32": 4 * 96 + 1000, "fp16": 4 * 96 + 1000}
    assert disk["all customers' files"]["fp32"] == 999 * 4096
    assert disk["basis"]["fp32"] == 4 * (factors + 12 * 32)
    assert plan.memory_bytes == {
        name: 1000 * 96 * each + (numbers + factors) * each for name, each in (("fp32", 4), ("fp16", 2))
    }


def test_a_fixed_rank_is_padded_in_memory_alone(tiny_base: Path, known: None) -> None:
    plan = make_plan(tiny_base, 9, rank=5)
    assert (plan.coefficients, plan.table_width) == (12 * 5, 12 * 8)
    assert sizes(plan, "memory")["coefficient table"]["fp32"] == 10 * 96 * 4
    assert make_plan(tiny_base, 9, rank=1000).coefficients == 12 * 32


def test_a_plan_by_a_basis_is_what_that_basis_takes(
    tiny_base: Path,
    tiny_basis: Basis,
    tiny_basis_file: Path,
    tiny_customer: Coefficients,
    switchable: Path,
    tmp_path: Path,
) -> None:
    plan = make_plan(tiny_base, 300, basis=tiny_basis_file)
    assert (plan.layers, plan.coefficients) == (len(tiny_basis.targets), tiny_basis.total_rank)
    disk = sizes(plan, "disk")
    assert disk["basis"]["fp32"] == tiny_basis_file.stat().st_size
    assert disk["base"]["fp32"] == (tiny_base / "model.safetensors").stat().st_size
    session = SwitchableSession(open_bundle(switchable), rows=301, threads=1)
    table = session.table.memory.parts[TABLE]
    assert sizes(plan, "memory")["coefficient table"]["fp32"] == table.read_rows(0, table.rows).nbytes
    manifest = open_bundle(switchable).manifest
    names = [f"{number:016d}" for number in range(300)]
    for dtype in ("fp32", "fp16"):
        write_packed(((name, tiny_customer) for name in names), tmp_path / "all.safetensors", manifest, dtype=dtype)
        assert disk["packed file of all"][dtype] == (tmp_path / "all.safetensors").stat().st_size


def test_the_factors_in_memory_are_those_of_the_graph(
    tiny_base: Path, tiny_basis: Basis, tiny_basis_file: Path, switchable: Path
) -> None:
    graph = onnx.load(open_bundle(switchable).model).graph
    stored = sum(numpy_helper.to_array(part).nbytes for part in graph.initializer)
    memory = sizes(make_plan(tiny_base, 1, basis=tiny_basis_file), "memory")
    planned = memory["base"]["fp32"] + memory["basis"]["fp32"]
    # Beside them a graph has constants of its own, and lacks rows of positions that no text reaches.
    assert stored == pytest.approx(planned, rel=0.05)


def test_output_layers_of_customers(
    tiny_base: Path, tiny_basis_file: Path, tiny_basis: Basis, texts: Examples, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    options = OnnxOptions(data=texts, head_labels=6, table_dtype="fp16")
    export_switchable(ExportJob(checkpoint, tiny_basis, tmp_path / "b"), options)
    plan = make_plan(tiny_base, 99, basis=tiny_basis_file, labels=6)
    session = SwitchableSession(open_bundle(tmp_path / "b"), rows=100, threads=1)
    memory = sizes(plan, "memory")
    tables = memory["coefficient table"]["fp16"] + memory["customers' output layers"]["fp16"]
    assert tables == session.table.memory.size_bytes
    assert memory["customers' output layers"]["fp16"] == 100 * 6 * (32 + 1) * 4
    # They cannot be packed.
    assert "packed file of all" not in sizes(plan, "disk")


def test_a_customers_file_is_about_as_large_as_planned(
    tiny_base: Path, tiny_basis_file: Path, tiny_customer: Coefficients, tmp_path: Path
) -> None:
    head = {"classifier.weight": np.ones((4, 32), np.float32), "classifier.bias": np.ones(4, np.float32)}
    for labels, customer in ((0, tiny_customer), (4, replace(tiny_customer, head=head))):
        write_coefficients(customer, tmp_path / "one.safetensors")
        planned = sizes(make_plan(tiny_base, 1, basis=tiny_basis_file, labels=labels), "disk")
        found = (tmp_path / "one.safetensors").stat().st_size
        # What a file says of its training takes kilobytes, and this one was not trained.
        assert 0 <= planned["one customer's file"]["fp32"] - found <= DISK_BLOCK
        assert planned["all customers' files"]["fp32"] % DISK_BLOCK == 0


def test_speeds_are_scaled_by_the_weights_of_the_blocks(tiny_base: Path, known: None) -> None:
    plan = make_plan(tiny_base, 5, gpu="z9")
    # A thousand rows a second of a base with half the weights in its linear layers: half as many of this one.
    assert [(speed.measured.device, speed.rows_per_s) for speed in plan.speeds] == [("NVIDIA Z9 40GB", 500.0)]
    assert plan.note == ""
    assert [speed.measured.device for speed in make_plan(tiny_base, 5).speeds] == ["NVIDIA Z9 40GB", "8 CPU cores"]
    # Of a larger base ten: a plan counts on no more.
    small = make_plan(tiny_base, 5, gpu="CPU")
    assert [speed.rows_per_s for speed in small.speeds] == [10.0]
    assert small.note.startswith("not measured on so small a base: the estimates are the rates of larger ones")


@pytest.mark.parametrize("name", ["Z9 80GB", "Z", "B300", "", "--"])
def test_a_device_without_figures_is_said_to_have_none(tiny_base: Path, known: None, name: str) -> None:
    plan = make_plan(tiny_base, 5, gpu=name)
    assert plan.speeds == ()
    assert plan.note == f"no figure is recorded on {name}; there are figures on NVIDIA Z9 40GB, 8 CPU cores"


def test_the_installed_figures_are_those_of_the_records() -> None:
    assert json.loads(FILE.read_text("utf-8")) == figures()
    assert recorded().rates_on("h100") and recorded().rates_on("cpu") and not recorded().rates_on("h1")


def test_the_share_of_directions_is_near_that_of_a_real_factorization(tiny_base: Path) -> None:
    # Random weights have flatter spectra than trained ones, so the share is not the same; a wrong unit would show.
    checkpoint = open_checkpoint(str(tiny_base))
    found = factorize(checkpoint, choose_targets(checkpoint.skeleton()), EnergyShare(0.5)).total_rank
    assert 0.5 < make_plan(tiny_base, 1).coefficients / found < 2


def test_a_basis_of_another_base_is_refused(tiny_base: Path, tiny_basis: Basis, tmp_path: Path) -> None:
    first = tiny_basis.targets[0]
    for change in (replace(first, name="bert.other"), replace(first, r=np.ones((first.rank, 40), np.float32))):
        # The diagonal is as long as the smaller side.
        write_basis(replace(tiny_basis, targets=(change,)), tmp_path / "other.safetensors")
        with pytest.raises(BasisMismatchError, match=f"other.safetensors has a layer {change.name} of 32 x .*base has"):
            make_plan(tiny_base, 1, basis=tmp_path / "other.safetensors")


@pytest.mark.parametrize("place", [0, -1])
def test_a_basis_of_other_weights_of_the_same_shapes_is_refused(
    tiny_base: Path, tiny_basis: Basis, tmp_path: Path, place: int
) -> None:
    targets = list(tiny_basis.targets)
    targets[place] = replace(targets[place], weight_digest="0" * 64)
    write_basis(replace(tiny_basis, targets=tuple(targets)), tmp_path / "other.safetensors")
    name = targets[place].name
    with pytest.raises(BasisMismatchError, match=f"was made from other weights than this base's: those of {name}"):
        make_plan(tiny_base, 1, basis=tmp_path / "other.safetensors")


def test_what_is_no_basis_or_no_base_is_refused(tiny_base: Path, tiny_customer_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a basis file"):
        make_plan(tiny_base, 1, basis=tiny_customer_file)
    with pytest.raises(InputError, match="holds no config.json: give the folder of a checkpoint"):
        make_plan(tmp_path / "nothing", 1)
    for wrong in ({"rank": 0}, {"labels": -1}):
        with pytest.raises(InputError, match="a plan needs"):
            make_plan(tiny_base, 1, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="either a basis or a rank"):
        make_plan(tiny_base, 1, basis=tiny_customer_file, rank=3)
    shutil.copy(tiny_base / "config.json", tmp_path)
    safetensors.numpy.save_file({"classifier.weight": np.ones((2, 3), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="has no linear layers in numbered blocks"):
        make_plan(tmp_path, 1)
    config = json.loads((tiny_base / "config.json").read_text("utf-8"))
    del config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    shutil.copy(tiny_base / "model.safetensors", tmp_path)
    with pytest.raises(InputError, match="names no hidden_size"):
        make_plan(tmp_path, 1, labels=3)


def test_half_precision_files_are_counted_by_their_numbers(tiny_base: Path, tmp_path: Path) -> None:
    model = open_checkpoint(str(tiny_base)).load_model().to(torch.float16)
    model.save_pretrained(tmp_path)
    whole, half = (sizes(make_plan(folder, 1), "memory")["base"] for folder in (tiny_base, tmp_path))
    assert whole == half


def test_the_command_prints_the_plan(tiny_base: Path, tiny_basis: Basis, tiny_basis_file: Path, tmp_path: Path) -> None:
    shown = run_here("doctor", "--plan", tiny_base, "--customers", 1000, "--basis", tiny_basis_file, cwd=tmp_path)
    assert shown.code == 0, shown.err
    for words in (f"1000 customers of {tiny_base}", "coefficient table", "packed file of all", "1001 rows x", "H100"):
        assert words in shown.out
    shown = run_here("doctor", "--plan", tiny_base, "--customers", 1000, "--gpu", "abacus", "--json", cwd=tmp_path)
    record = json.loads(shown.out)
    assert record["plan"]["note"].startswith("no figure is recorded on abacus; there are figures on NVIDIA H100")
    assert record["memory_bytes"] == make_plan(tiny_base, 1000).memory_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--customers", "3"], "--customers belongs to --plan BASE"),
        (["--gpu", "H100", "--rank", "3"], "--gpu, --rank belongs to --plan BASE"),
        (["--plan", "."], "--plan needs --customers"),
        (["--plan", ".", "--customers", "0"], "0 is not in the range"),
        (["--plan", "nowhere", "--customers", "1"], "nowhere holds no config.json"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    shown = run_here("doctor", *options, cwd=tmp_path)
    assert shown.code == 2 and message in shown.err


def test_a_basis_and_a_rank_are_refused(tiny_base: Path, tiny_basis_file: Path, tmp_path: Path) -> None:
    given = ("--plan", tiny_base, "--customers", 1, "--basis", tiny_basis_file, "--rank", 3)
    shown = run_here("doctor", *given, cwd=tmp_path)
    assert shown.code == 2 and "--basis and --rank exclude each other" in shown.err


def test_a_plan_loads_no_framework_and_no_runtime(tiny_base: Path) -> None:
    code = (
        "from pathlib import Path; from qrlora_deploy.inspection.planning import make_plan; "
        f"make_plan(Path({str(tiny_base)!r}), 9)"
    )
    assert loaded_by(code) & {"torch", "transformers", "onnx", "onnxruntime"} == set()


def test_a_fixed_rank_plan_is_that_of_its_basis(tiny_base: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton()), FixedRank(5))
    write_basis(basis, tmp_path / "five.safetensors")
    by_file, by_rank = make_plan(tiny_base, 7, basis=tmp_path / "five.safetensors"), make_plan(tiny_base, 7, rank=5)
    assert sizes(by_file, "memory") == sizes(by_rank, "memory")
    assert (by_file.coefficients, by_file.table_width) == (by_rank.coefficients, by_rank.table_width)
    # The header comes on top of the numbers.
    assert 0 < sizes(by_file, "disk")["basis"]["fp32"] - sizes(by_rank, "disk")["basis"]["fp32"] < 12 * 1024
