"""A base that lacks tensors is refused by every command with their names; nothing is filled with random numbers."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from transformers import BertForMaskedLM, BertModel

from exporters.onnx import export_merged, export_switchable
from exporters.onnx.options import OnnxOptions
from exporters.onnx.verifying import verify_against
from exporters.peft.lora_folder import export_peft
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.merging.checkpoints import merge, unmerge
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.models.weight_files import INDEX, SINGLE
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.training.fleet.customers import FleetSource
from qrlora_deploy.training.fleet.options import FleetOptions
from qrlora_deploy.training.fleet.run import train_fleet
from qrlora_deploy.training.settings import TrainSettings, WarmupSettings
from qrlora_deploy.training.trainer import train
from qrlora_deploy.training.warmup import warmup
from tests.tiny import LABELS, SENTENCES, build_tokenizer

Tensors = dict[str, torch.Tensor]
ROWS = Examples(list(SENTENCES[:4]), None, list(LABELS), "rows")
ONE_STEP = WarmupSettings(epochs=1, max_length=16, device="cpu")


def rewritten(base: Path, folder: Path, change: Callable[[Tensors], Tensors], **config: object) -> Checkpoint:
    """A copy of a base whose tensors and config are changed."""
    shutil.copytree(base, folder)
    tensors = change(safetensors.torch.load_file(folder / SINGLE))
    safetensors.torch.save_file(tensors, folder / SINGLE, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return open_checkpoint(str(folder))


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: v for name, v in tensors.items() if not any(part in name for part in parts)}


def inside(place: str, wrapper: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(place, place + wrapper): value for name, value in tensors.items()}


def stored_as(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: v.to(dtype) if "word_embeddings" in name else v for name, v in tensors.items()}


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


def same(tensors: Tensors) -> Tensors:
    return tensors


@pytest.fixture(scope="module")
def no_pooler(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return rewritten(tiny_base, tmp_path_factory.mktemp("lacking") / "no-pooler", without("pooler"))


def test_every_command_names_what_is_missing(
    no_pooler: Checkpoint,
    tiny_base: Path,
    tiny_basis: Basis,
    tiny_customer: Coefficients,
    exported: Path,
    texts: Examples,
    tmp_path: Path,
) -> None:
    customer = replace(tiny_customer, base_digest=no_pooler.digest)
    bundle = open_bundle(exported)
    bundle = replace(
        bundle,
        manifest=bundle.manifest.model_copy(
            update={"base_digest": no_pooler.digest, "coefficients_digest": customer.digest}
        ),
    )
    merge(open_checkpoint(str(tiny_base)), tiny_basis, tiny_customer, tmp_path / "merged")
    (tmp_path / "data").mkdir()
    settings = TrainSettings(epochs=1, max_length=16, device="cpu")
    job = ExportJob(no_pooler, tiny_basis, tmp_path / "out", customer)
    options = OnnxOptions(data=texts)
    merged = open_checkpoint(str(tmp_path / "merged"))
    commands: dict[str, Callable[[], object]] = {
        "factorize": lambda: factorize(no_pooler, list(tiny_basis.names), EnergyShare()),
        "train": lambda: train(no_pooler, tiny_basis, ROWS, None, settings, tmp_path / "out"),
        "train-fleet": lambda: train_fleet(
            no_pooler, tiny_basis, FleetSource(tmp_path / "data"), settings, FleetOptions(tmp_path / "out")
        ),
        "merge": lambda: merge(no_pooler, tiny_basis, customer, tmp_path / "out"),
        "unmerge": lambda: unmerge(merged, tiny_basis, tiny_customer, tmp_path / "out", no_pooler),
        "export merged": lambda: export_merged(job, options),
        "export switchable": lambda: export_switchable(replace(job, coefficients=None), options),
        "export peft": lambda: export_peft(job),
        "verify": lambda: verify_against(bundle, no_pooler, tiny_basis, customer, texts),
    }
    missing = r"2 of its 41 tensors are missing: bert.pooler.dense.weight, bert.pooler.dense.bias; give it a head with"
    for name, command in commands.items():
        with pytest.raises(InputError, match=missing):
            command()
        assert not (tmp_path / "out").exists(), name


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (without("classifier"), {}, "2 of its 41 tensors are missing: classifier.weight, classifier.bias; give it a"),
        (without("classifier.bias"), {}, "1 of its 41 tensors are missing: classifier.bias"),
        (without("word_embeddings"), {}, "are missing: bert.embeddings.word_embeddings.weight$"),
        (without("query.bias"), {}, r"2 of its 41 tensors are missing: .*layer.0.*query.bias, .*layer.1.*query.bias"),
        (prefixed("_orig_mod."), {}, r"41 of its 41 .*prefix _orig_mod\. of torch.compile; save `model._orig_mod`"),
        (prefixed("module."), {}, r"prefix module\. of DataParallel .*; save `model.module`"),
        (prefixed("auto_model."), {}, r"begin with auto_model\.; save the transformers model itself"),
        (
            lambda tensors: {name.replace("encoder.", "encoder._orig_mod."): v for name, v in tensors.items()},
            {},
            r"prefix _orig_mod\. of torch.compile",
        ),
        (inside("encoder.layer.", "_fsdp_wrapped_module."), {}, r"prefix _fsdp_wrapped_module\. of FSDP; save a full"),
        (inside("layer.1.", "_checkpoint_wrapped_module."), {}, r"_checkpoint_wrapped_module\. of activation checkp"),
        (prefixed("base_model.model."), {}, r"prefix base_model\.model\. of PEFT; save what `merge_and_unload"),
        (
            stored_as(torch.int32),
            {},
            r"word_embeddings.weight is stored as I32 \[.*an unquantised base",
        ),
        (stored_as(torch.float8_e4m3fn), {}, "word_embeddings.weight is stored as F8_E4M3 .* an unquantised base"),
        (same, {"num_hidden_layers": 3}, "16 of its 57 tensors are missing: bert.encoder.layer.2"),
        (same, {"hidden_size": 16}, r"tensors have other shapes: .* is \[.*32\], but \[.*16\] by config.json"),
        (same, {"id2label": None}, r"classifier.weight is \[4, 32\], but \[2, 32\] .*id2label in config.json has to"),
        (
            lambda tensors: tensors | {"embeddings.LayerNorm.bias": tensors["bert.embeddings.LayerNorm.bias"] + 1},
            {},
            "hold bert.embeddings.LayerNorm.bias and embeddings.LayerNorm.bias, of which the model has one",
        ),
    ],
)
def test_what_is_missing_is_named(
    tiny_base: Path,
    tmp_path: Path,
    change: Callable[[Tensors], Tensors],
    config: dict[str, object],
    message: str,
) -> None:
    broken = rewritten(tiny_base, tmp_path / "broken", change, **config)
    with pytest.raises(InputError, match=message) as caught:
        broken.check_base()
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        broken.load_model()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(tiny_base: Path, tmp_path: Path, value: float) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors["bert.embeddings.word_embeddings.weight"][5, 0] = value
        return tensors

    broken = rewritten(tiny_base, tmp_path / "broken", spoil)
    message = "broken: weights hold NaN or Inf: bert.embeddings.word_embeddings.weight; give"
    with pytest.raises(InputError, match=message):
        broken.load_model()
    with pytest.raises(InputError, match=message):
        warmup(broken, ROWS, None, tmp_path / "out", ONE_STEP)


def test_older_names_and_the_models_prefix_are_right(tiny_base: Path, tmp_path: Path) -> None:
    def older(tensors: Tensors) -> Tensors:
        names = {name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for name in tensors}
        return {names[name]: value for name, value in tensors.items()}

    old = rewritten(tiny_base, tmp_path / "old", older)
    old.check_base()
    expected = open_checkpoint(str(tiny_base)).load_model().state_dict()
    found = old.load_model().state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("pooler", [True, False])
def test_an_encoder_without_a_head_can_be_factorized(
    tiny_base: Path, tmp_path: Path, prefix: str, pooler: bool
) -> None:
    BertModel.from_pretrained(tiny_base, add_pooling_layer=pooler).save_pretrained(tmp_path / "plain")
    encoder = rewritten(tmp_path / "plain", tmp_path / "encoder", prefixed(prefix))
    names = choose_targets(encoder.skeleton(), ["query"])
    assert len(factorize(encoder, names, FixedRank(2)).targets) == 2


def test_tied_weights_are_stored_once(tiny_base: Path, tmp_path: Path) -> None:
    masked = BertForMaskedLM.from_pretrained(tiny_base)
    masked.save_pretrained(tmp_path)
    open_checkpoint(str(tmp_path)).check_base()


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (prefixed("_orig_mod."), {}, r"prefix _orig_mod\. of torch.compile"),
        (prefixed("module."), {}, r"prefix module\. of DataParallel"),
        (without("word_embeddings"), {}, "missing: bert.embeddings.word_embeddings.weight"),
        (without("pooler.dense.bias"), {}, "missing: bert.pooler.dense.bias"),
        (same, {"num_hidden_layers": 3}, "16 of its 57 tensors are missing"),
        (same, {"vocab_size": 7}, r"other shapes: bert.embeddings.word_embeddings.weight is"),
    ],
)
def test_warm_up_draws_a_head_and_nothing_else(
    tiny_base: Path,
    tmp_path: Path,
    change: Callable[[Tensors], Tensors],
    config: dict[str, object],
    message: str,
) -> None:
    broken = rewritten(tiny_base, tmp_path / "broken", change, **config)
    for rows in (ROWS, replace(ROWS, labels=["a", "b", "c", "d"]), replace(ROWS, labels=["a", "b"] * 2)):
        with pytest.raises(InputError, match=message):
            warmup(broken, rows, None, tmp_path / "out", ONE_STEP)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lacking", ["classifier", "pooler", "nothing"])
def test_warm_up_gives_what_a_head_is_made_of(tiny_base: Path, tmp_path: Path, lacking: str) -> None:
    base = rewritten(tiny_base, tmp_path / "base", without(lacking))
    other = replace(ROWS, labels=["a", "b"] * 2)
    for name, rows in (("kept", ROWS), ("new", other)):
        warmup(base, rows, None, tmp_path / name, ONE_STEP)
        made = open_checkpoint(str(tmp_path / name))
        made.check_base()
        assert made.labels == (LABELS if name == "kept" else ("a", "b"))


@pytest.mark.skipif(not hasattr(transformers, "NomicBertConfig"), reason="this transformers has no NomicBERT")
def test_names_that_transformers_converts_are_refused_before_the_warm_up(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.NomicBertConfig(vocab_size=len(tokenizer), num_labels=4, **sizes)
    transformers.NomicBertForSequenceClassification(config).save_pretrained(tmp_path / "nomic")
    tokenizer.save_pretrained(tmp_path / "nomic")
    base = open_checkpoint(str(tmp_path / "nomic"))
    message = "the weight of nomic_bert.layers.0.* is stored under other names, which transformers converts"
    with pytest.raises(InputError, match=message):
        warmup(base, ROWS, None, tmp_path / "out", ONE_STEP)
    with pytest.raises(InputError, match=message):
        factorize(base, choose_targets(base.skeleton()), FixedRank(1))


@pytest.fixture
def saved_twice(tiny_base: Path, tmp_path: Path) -> Path:
    """One model as a single file, and the shards of another beside it."""
    other = open_checkpoint(str(tiny_base)).load_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    other.save_pretrained(tmp_path / "twice", max_shard_size="10KB")
    for file in tiny_base.iterdir():
        shutil.copy(file, tmp_path / "twice")
    return tmp_path / "twice"


def test_an_index_beside_a_single_file_is_nobodys(
    saved_twice: Path, tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path
) -> None:
    twice, base = open_checkpoint(str(saved_twice)), open_checkpoint(str(tiny_base))
    assert (saved_twice / INDEX).is_file() and twice.shards == [saved_twice / SINGLE] and twice.digest == base.digest
    state = twice.load_model().state_dict()
    assert all(torch.equal(state[name], base.read(name)) for name in base.tensor_files)
    merge(twice, tiny_basis, tiny_customer, tmp_path / "merged")
    unmerge(open_checkpoint(str(tmp_path / "merged")), tiny_basis, tiny_customer, tmp_path / "back", twice)
    for folder in ("merged", "back"):
        assert [file.name for file in (tmp_path / folder).glob("*.safetensors*")] == [SINGLE]
    assert open_checkpoint(str(tmp_path / "back")).digest == base.digest


def test_an_index_whose_shards_are_gone_is_passed_over(saved_twice: Path, tiny_base: Path) -> None:
    for shard in saved_twice.glob("model-*.safetensors"):
        shard.unlink()
    assert open_checkpoint(str(saved_twice)).digest == open_checkpoint(str(tiny_base)).digest


def test_what_transformers_would_read_instead_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    adapted = rewritten(tiny_base, tmp_path / "adapted", same)
    (tmp_path / "adapted" / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else"}')
    with pytest.raises(InputError, match="holds adapter_config.json: transformers would load the adapter"):
        adapted.check_base()
    renamed = rewritten(tiny_base, tmp_path / "renamed", same, transformers_weights="other.safetensors")
    with pytest.raises(InputError, match="transformers_weights names another file"):
        renamed.check_base()


def test_a_file_that_cannot_be_read_says_why(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = rewritten(tiny_base, tmp_path / "base", same)
    whole = Path.open

    def refuse(self: Path, *args: object, **kwargs: object) -> object:
        if self.name == SINGLE:
            raise PermissionError(13, "Permission denied")
        return whole(self, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read: Permission denied"):
        base.digest  # noqa: B018


def test_a_side_file_that_cannot_be_read_is_no_failed_write(
    tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = rewritten(tiny_base, tmp_path / "base", same)
    whole = Path.open

    def refuse(self: Path, *args: object, **kwargs: object) -> object:
        if self == base.folder / "tokenizer_config.json":
            raise PermissionError(13, "Permission denied")
        return whole(self, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"tokenizer_config\.json cannot be read: Permission denied"):
        merge(base, tiny_basis, tiny_customer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
