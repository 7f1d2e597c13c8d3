"""What works the whole way from factorizing to serving, and what is refused before anything is paid for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from exporters.onnx import export_switchable
from qrlora_deploy.cli import cli
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import write_basis
from qrlora_deploy.models.adapter import attach
from qrlora_deploy.models.capacity import check_ids
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.families import FAMILIES
from qrlora_deploy.models.support import check_padding, why_unsupported
from qrlora_deploy.models.targets import choose_targets, left_out
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.training.settings import TrainSettings, WarmupSettings
from qrlora_deploy.training.trainer import train
from qrlora_deploy.training.warmup import warmup
from tests.tiny import LABELS, SENTENCES, build_tokenizer, save_base

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
HALVES = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}


def save_model(kind: str, folder: Path, tokenizer: Any = None, **settings: Any) -> Path:
    tokenizer = build_tokenizer() if tokenizer is None else tokenizer
    name = kind.removesuffix("ForSequenceClassification")
    config = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), num_labels=4, **settings)
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForSequenceClassification")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("Bart", {"d_model": 8, "pad_token_id": 0, **HALVES}, "is not supported, since .* an encoder with a decoder"),
        ("T5", {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}, "an encoder with a decoder"),
        (
            "Mixtral",
            SMALL | {"num_key_value_heads": 2, "num_local_experts": 2, "pad_token_id": 0},
            "mixture of experts",
        ),
        ("GPT2", {"n_embd": 8, "n_layer": 1, "n_head": 2}, r"pad_token_id in config\.json, to 0"),
        ("Bert", SMALL | {"problem_type": "regression"}, "predicts 4 numbers; one is supported"),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_first_command(
    kind: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save_model(kind, tmp_path / "base", **settings)
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(InputError, match=message):
        checkpoint.check_base()
    result = run("factorize", folder, "-o", tmp_path / "basis.safetensors")
    assert result.exit_code == 2 and result.output.count("\n") == 1
    assert not (tmp_path / "basis.safetensors").exists()


def test_what_is_known_is_of_families_that_transformers_has() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    types = [kind for family in FAMILIES for kind in family.model_types]
    assert set(types) <= set(CONFIG_MAPPING) and len(set(types)) == len(types)
    for family in FAMILIES:
        for kind in family.model_types if family.refused else ():
            model = torch.nn.Module()
            model.config = CONFIG_MAPPING[kind]()
            assert why_unsupported(model) == family.refused


def test_the_remedy_for_a_missing_padding_token_is_the_whole_one(tmp_path: Path) -> None:
    folder = save_model("GPT2", tmp_path / "base", n_embd=8, n_layer=1, n_head=2)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": 0}))
    open_checkpoint(str(folder)).check_base()


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("Deberta", {}, {"pos_proj", "pos_q_proj"}),
        ("DebertaV2", {"share_att_key": False}, {"pos_key_proj", "pos_query_proj"}),
        ("DebertaV2", {"share_att_key": True}, {"key_proj", "query_proj"}),
    ],
)
def test_layers_that_all_texts_share_are_left_out_and_named(
    kind: str, settings: dict[str, Any], expected: set[str], tmp_path: Path
) -> None:
    folder = save_model(kind, tmp_path / "base", **SMALL, **RELATIVE, **settings)
    basis = tmp_path / "basis.safetensors"
    result = run("factorize", folder, "-o", basis, "--rank", 2, "--json")
    record = json.loads(result.stdout)
    names = [name for part in record["left_out"] for name in part["names"]]
    assert {name.rsplit(".", 1)[-1] for name in names} == expected
    assert not {target["name"] for target in record["targets"]} & set(names)
    model = open_checkpoint(str(folder)).skeleton()
    seen = layers_without_a_batch(folder)
    assert seen == set(names) and set(choose_targets(model)) | seen == set(choose_targets(model, [r".*\.\d+\..*"]))
    chosen = run("factorize", folder, "-o", tmp_path / "other", "--rank", 2, "--target", ",".join(expected))
    assert chosen.exit_code == 0 and "see relative positions" in chosen.stderr and "--merge" in chosen.stderr


def layers_without_a_batch(folder: Path) -> set[str]:
    """What a run shows, instead of what is known by name."""
    model, found = open_checkpoint(str(folder)).load_model(), set()
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and ".layer." in name:
            module.register_forward_pre_hook(
                lambda _module, given, name=name: found.add(name) if given[0].shape[0] != 3 else None
            )
    model(input_ids=torch.full((3, 7), 8))
    return found


def test_parameters_that_are_no_layers_are_named() -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.layers[0].dense = torch.nn.Linear(2, 2)
    model.layers[0].experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
    (found,) = left_out(model)
    assert found.names == ("layers.0.experts",) and "no matrices of linear layers" in str(found)
    assert left_out(model.layers[0].dense) == []


def test_a_side_branch_has_the_attributes_of_its_layer(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_base(tmp_path / "base")))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton(), ["intermediate.dense"]), FixedRank(2))
    model = checkpoint.load_model()
    layer = model.bert.encoder.layer[0].intermediate.dense
    branch = next(iter(attach(model, basis).values()))
    assert branch.weight is layer.weight and branch.bias is layer.bias
    assert (branch.in_features, branch.out_features) == (32, 48)
    assert [name for name, _ in branch.named_parameters()] == ["u", "base.weight", "base.bias"]


def texts(pairs: bool = False) -> Examples:
    labels = [LABELS[index % 4] for index in range(len(SENTENCES))]
    return Examples(list(SENTENCES), list(SENTENCES) if pairs else None, labels, "data.tsv")


@pytest.fixture
def token_too_many(tmp_path: Path) -> Path:
    folder = save_base(tmp_path / "base")
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<ticket>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_token_without_a_row_is_named_before_training(token_too_many: Path, tmp_path: Path) -> None:
    whole = open_checkpoint(str(save_base(tmp_path / "whole")))  # the same weights
    basis = factorize(whole, choose_targets(whole.skeleton(), ["query"]), FixedRank(2))
    checkpoint = open_checkpoint(str(token_too_many))
    message = r"makes '<ticket>' token \d+, but its embedding has \d+ rows; .*resize_token_embeddings"
    with pytest.raises(InputError, match=message):
        checkpoint.check_base()
    with pytest.raises(InputError, match=message):
        train(checkpoint, basis, texts(), None, TrainSettings(max_length=16), tmp_path / "run")
    with pytest.raises(InputError, match=message):
        warmup(checkpoint, texts(), None, tmp_path / "warm", WarmupSettings(max_length=16))
    with pytest.raises(InputError, match=message):
        export_switchable(ExportJob(checkpoint, basis, tmp_path / "bundle"))
    data = tmp_path / "fleet.tsv"
    rows = [f"acme\t{text}\t{label}" for text, label in zip(SENTENCES, texts().labels, strict=True)]
    data.write_text("\n".join(["customer\ttext\tlabel", *rows]))
    write_basis(basis, tmp_path / "basis.safetensors")
    found = run(
        "train-fleet",
        token_too_many,
        "--basis",
        tmp_path / "basis.safetensors",
        "--data",
        data,
        "--customer-column",
        "customer",
        "--max-length",
        16,
        "-o",
        tmp_path / "fleet",
    )
    assert found.exit_code == 2 and "makes '<ticket>' token" in found.output
    assert not (tmp_path / "warm").exists() and not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(("pairs", "rows", "fits"), [(False, 1, True), (True, 1, False), (True, 2, True)])
def test_segments_are_checked_where_there_are_pairs(pairs: bool, rows: int, fits: bool) -> None:
    tokenizer = build_tokenizer()
    config = transformers.BertConfig(vocab_size=len(tokenizer), type_vocab_size=rows, **SMALL)
    model = transformers.BertForSequenceClassification(config)
    if fits:
        check_ids("base", model, tokenizer, pairs)
        return
    with pytest.raises(InputError, match=r"makes segment 1 .* have 1 rows; take token_type_ids out of"):
        check_ids("base", model, tokenizer, pairs)


@pytest.mark.parametrize(
    ("side", "pooling", "fits"), [("left", "cls", False), ("left", "mean", True), ("right", "cls", True)]
)
def test_padding_that_hides_the_text_from_the_answer_is_refused(side: str, pooling: str, fits: bool) -> None:
    tokenizer = build_tokenizer()
    tokenizer.padding_side = side
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer), local_attention=8, classifier_pooling=pooling, pad_token_id=0, **SMALL
    )
    with torch.device("meta"):
        model = transformers.ModernBertForSequenceClassification(config)
    if fits:
        check_padding("base", model, tokenizer)
        return
    with pytest.raises(InputError, match="base pads on the left, but answers at the first token .* sees 4 tokens"):
        check_padding("base", model, tokenizer)
