"""Text that goes on from a text: losses against transformers' own, scores against greedy writing."""

from typing import Any

import numpy as np
import pytest
import torch

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.turns import Turn
from qrlora_deploy.errors import InputError
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.adapter import attach, set_coefficients
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.tasks.answer_rows import answer_rows
from qrlora_deploy.tasks.base import IGNORED
from qrlora_deploy.tasks.causal_lm import CausalLM
from qrlora_deploy.tasks.registry import guess_task
from qrlora_deploy.training.answers import AnswerCollator
from tests.tiny_decoder import save_decoder
from tests.tolerances import FP32_SIDE_BRANCH

TASK = CausalLM()
PLAIN = [
    (Turn("prompt", "book a flight\nIntent:"), Turn("completion", " travel")),
    (Turn("prompt", "what is the balance of my savings account\nIntent:"), Turn("completion", " banking")),
    (Turn("prompt", "cook"), Turn("completion", " the rice and play some music")),
]


def plain(turns: list[Any] = PLAIN) -> Examples:
    return Examples([""] * len(turns), None, [""] * len(turns), "some.jsonl", turns=list(turns))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(save_decoder(tmp_path_factory.mktemp("decoder") / "base")))


@pytest.fixture(scope="module")
def basis(base: Checkpoint) -> Basis:
    return factorize(base, choose_targets(base.skeleton()), EnergyShare(0.5))


@pytest.fixture
def attached(base: Checkpoint, basis: Basis) -> tuple[Any, Any]:
    """A model with coefficients that are not zero, and its adapters."""
    model = base.load_model()
    adapters = attach(model, basis)
    set_coefficients(adapters, basis, np.random.default_rng(0).normal(0, 0.3, basis.total_rank).astype(np.float32))
    return model, adapters


def batch_of(base: Checkpoint, room: int | None = None) -> dict[str, torch.Tensor]:
    rows = answer_rows(base.tokenizer(), plain(), 64).rows
    found: dict[str, torch.Tensor] = AnswerCollator(0, room)(rows)
    return found


def test_loss_and_gradients_are_those_of_transformers_own_forward(base: Checkpoint, attached: Any) -> None:
    model, adapters = attached
    batch = batch_of(base)
    labels = batch.pop("labels")
    assert (labels == IGNORED).any(1).all() and (labels != IGNORED).any(1).all()
    expected = model(**batch, labels=labels).loss
    trained = [adapter.u for adapter in adapters.values()]
    loss = TASK.loss(TASK.graded(model, batch, labels), labels)
    torch.testing.assert_close(loss, expected, **FP32_SIDE_BRANCH)
    gradients = [torch.autograd.grad(value, trained, retain_graph=True) for value in (loss, expected)]
    for found, wanted in zip(*gradients, strict=True):
        assert found.abs().max() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_only_coefficients_get_a_gradient(base: Checkpoint, attached: Any) -> None:
    model, adapters = attached
    batch = batch_of(base)
    labels = batch.pop("labels")
    TASK.loss(TASK.graded(model, batch, labels), labels).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"{name}.u" for name in adapters} and len(adapters) == 14


def test_packed_rows_have_the_loss_and_gradients_of_rows_apart(base: Checkpoint, attached: Any) -> None:
    model, adapters = attached
    trained = [adapter.u for adapter in adapters.values()]
    found = []
    for room, rows in ((None, 3), (48, 2), (128, 1)):
        batch = batch_of(base, room)
        labels = batch.pop("labels")
        assert len(labels) == rows
        loss = TASK.loss(TASK.graded(model, batch, labels), labels)
        found.append((loss, *torch.autograd.grad(loss, trained)))
    for one, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_scores_are_those_of_greedy_writing(base: Checkpoint, attached: Any) -> None:
    model, _ = attached
    tokenizer = base.tokenizer()
    prompts = [[3, 4, 5], [50, 60], [7, 9, 200, 30]]
    rows = []
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        mask, options = torch.ones_like(ids), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        written = model.generate(ids, attention_mask=mask, max_new_tokens=5, **options)
        answer = written[0, len(prompt) :].tolist()
        if number == 1:
            answer[3] = (answer[3] + 1) % len(tokenizer)  # one token is another one
        rows.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    batch = AnswerCollator(0)(rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        graded = TASK.graded(model, batch, labels)
        losses = [
            torch.log_softmax(model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double(), 1) for row in rows
        ]
    score = TASK.score(graded.numpy(), labels.numpy())
    likelihoods = [
        -float(known[place - 1, label])
        for row, known in zip(rows, losses, strict=True)
        for place, label in enumerate(row["labels"])
        if label != IGNORED
    ]
    assert score["exact_match"] == pytest.approx(2 / 3)
    assert score["nll"] == pytest.approx(np.mean(likelihoods), rel=1e-4)
    assert 10 / 15 <= score["token_accuracy"] <= 14 / 15 and tuple(score) == TASK.metrics


def test_rows_of_the_other_kind_are_refused() -> None:
    assert guess_task(plain()).task == TASK
    with pytest.raises(InputError, match="some.tsv: its rows have labels, a text-generation needs answers"):
        TASK.encode(Examples(["a"], None, ["b"], "some.tsv"), ())
    with pytest.raises(InputError, match=r"its rows are prompts and answers, a text-classification needs texts"):
        guess_task(plain(), "classification").task.check_rows(plain())
    with pytest.raises(InputError, match="some.jsonl holds texts to write, and a decoder keeps its own head"):
        TASK.new_head(plain())


def test_a_checkpoint_is_a_decoder_by_its_class(base: Checkpoint) -> None:
    assert base.writes_text and not base.has_task_head and base.labels == () and base.task == TASK.name
    with pytest.raises(InputError, match="is a LlamaForCausalLM, which writes text; give it a head for feature-extra"):
        base.require_task_head("feature-extraction")


def test_a_prompt_has_the_tokens_that_it_has_alone(base: Checkpoint) -> None:
    tokenizer = base.tokenizer()
    made = answer_rows(tokenizer, plain(), 64)
    for row, turns in zip(made.rows, PLAIN, strict=True):
        prompt = tokenizer(turns[0].content)["input_ids"]
        answer = [label for label in row["labels"] if label != IGNORED]
        assert row["input_ids"][: len(prompt)] == prompt and row["labels"][: len(prompt)] == [IGNORED] * len(prompt)
        assert tokenizer.decode(answer[:-1]) == turns[1].content and answer[-1] == tokenizer.eos_token_id


def test_long_rows_are_cut_and_told(base: Checkpoint) -> None:
    made = answer_rows(base.tokenizer(), plain(), 12)
    assert (len(made.rows), made.cut, made.unread) == (2, 3, 1)
    assert made.remark(12) == "3 rows are cut at max_length=12; 1 of them have no answer before that"
    with pytest.raises(InputError, match="some.jsonl: no row has an answer within its first 2 tokens"):
        answer_rows(base.tokenizer(), plain(), 2)


def test_a_token_of_prompt_and_answer_is_parted(base: Checkpoint) -> None:
    tokenizer = base.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ' ' + m.content + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    chat = (Turn("user", "book"), Turn("assistant", "user of a"))
    (row,) = answer_rows(tokenizer, plain([chat]), 64).rows
    prompt = tokenizer("user book;assistant ", add_special_tokens=False)["input_ids"]
    whole = tokenizer("user book;assistant user of a;", add_special_tokens=False)["input_ids"]
    answer = tokenizer("user of a;", add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] != prompt  # " user" is one token
    assert row == {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
