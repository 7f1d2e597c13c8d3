"""Tags of words: entities, targets, loss, metrics, answers and agreement against hand, library and PyTorch values."""

import numpy as np
import pytest
import torch
from sklearn import metrics
from transformers import BertConfig, BertForTokenClassification

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.tasks.base import IGNORED, Span
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.entities import Entity, entities, f1_of
from qrlora_deploy.tasks.multi_label import MultiLabel
from qrlora_deploy.tasks.registry import guess_task, has_task_head, task_of_config
from qrlora_deploy.tasks.token_classification import TokenClassification
from qrlora_deploy.tokenization.words import NO_TOKEN, LocatedWords, joined

TASK = TokenClassification()
NAMES = ("O", "B-LOC", "I-LOC", "B-PER")


def examples(*rows: list[str]) -> Examples:
    texts = [joined(["word"] * len(tags)) for tags in rows]
    return Examples([text for text, _ in texts], None, [tuple(tags) for tags in rows], "a.jsonl", [p for _, p in texts])


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", []),
        ("B-X I-X O", [(0, 2, "X")]),
        ("B-X B-X I-X", [(0, 1, "X"), (1, 3, "X")]),
        ("I-X I-X", [(0, 2, "X")]),
        ("O I-X O I-X", [(1, 2, "X"), (3, 4, "X")]),
        ("B-X I-Y I-Y", [(0, 1, "X"), (1, 3, "Y")]),
        ("B-X O I-X", [(0, 1, "X"), (2, 3, "X")]),
        ("B-X I-X E-X S-X I-X", [(0, 3, "X"), (3, 4, "X"), (4, 5, "X")]),
        ("B-X L-X U-Y", [(0, 2, "X"), (2, 3, "Y")]),
        ("NOUN NOUN VERB", [(0, 1, "NOUN"), (1, 2, "NOUN"), (2, 3, "VERB")]),
        ("B-a-b I-a-b", [(0, 2, "a-b")]),
        ("X-ray B-", [(0, 1, "X-ray"), (1, 2, "B-")]),
    ],
)
def test_entities_by_hand(tags: str, found: list[tuple[int, int, str]]) -> None:
    assert list(entities(tags.split())) == [Entity(*one) for one in found]


def test_f1_counts_whole_entities_of_all_texts() -> None:
    # 3 wanted, 4 answered; the kind and both ends must be right: 2 are.
    expected = [["B-X", "I-X", "O", "B-Y"], ["O", "B-X"]]
    found = [["B-X", "I-X", "O", "B-X"], ["B-Y", "B-X"]]
    assert f1_of(found, expected) == 2 * 2 / (4 + 3)
    assert f1_of([["O"]], [["O"]]) == 0.0 and f1_of([["B-X"]], [["O"]]) == 0.0
    assert f1_of([["B-X", "O"]], [["B-X", "I-X"]]) == 0.0


def test_tags_are_recognised_and_nothing_else_is() -> None:
    rows = examples(["O", "B-LOC"])
    assert guess_task(rows).task == TASK
    assert TASK.recognise(Examples(["a"], None, [("a", "b")], "some")) is None
    assert guess_task(Examples(["a"], None, [("a", "b")], "some")).task == MultiLabel()
    for task in (Classification(), MultiLabel()):
        with pytest.raises(InputError, match="its words have tags, a text-"):
            task.check_rows(rows)
    with pytest.raises(InputError, match="needs tags of words"):
        TASK.check_rows(Examples(["a"], None, ["a"], "some"))


def test_a_new_head_has_the_tags_that_were_seen_outside_first() -> None:
    rows = examples(["I-LOC", "B-LOC"], ["O"], ["B-PER"])
    assert TASK.new_head(rows).labels == ("O", "B-LOC", "B-PER", "I-LOC")
    assert TASK.new_head(examples(["NOUN", "ADJ"])).labels == ("ADJ", "NOUN")
    with pytest.raises(InputError, match="every word has the tag O"):
        TASK.new_head(examples(["O", "O"]))


def test_targets_are_at_first_tokens() -> None:
    assert TASK.encode(examples(["O", "I-LOC"], ["B-PER"]), NAMES) == [[0, 2], [3]]
    words = LocatedWords("a b c", ((0, 1), (2, 3), (4, 5)), (1, 4, NO_TOKEN))
    assert TASK.place_target([3, 0, 1], words, 6) == [IGNORED, 3, IGNORED, IGNORED, 0, IGNORED]
    with pytest.raises(InputError) as caught:
        TASK.encode(examples(["O"], ["B-X", "I-X"]), NAMES)
    message = "a.jsonl: row 2 has unknown tags; of all rows 'B-X', 'I-X'; the head knows 'O', 'B-LOC', 'I-LOC', 'B-PER'"
    assert str(caught.value) == message


def test_loss_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForTokenClassification(BertConfig(vocab_size=20, num_labels=4, **sizes)).eval()
    targets = torch.randint(0, 4, (3, 5))
    targets[0, 2:] = targets[2, 0] = IGNORED
    with torch.no_grad():
        out = model(torch.randint(0, 20, (3, 5)), labels=targets)
    assert TASK.loss(out.logits, targets).item() == pytest.approx(out.loss.item(), rel=1e-6)
    assert TASK.loss(out.logits, torch.full_like(targets, IGNORED)).item() == 0.0
    assert task_of_config(None, 4, type(model).__name__) == TASK and task_of_config(None, 1, "XForTokenClassification")
    assert task_of_config(None, 4, "BertForSequenceClassification") == Classification()
    assert has_task_head("BertForTokenClassification") and not has_task_head("BertForMaskedLM")


def test_scores_against_scikit_learn_where_every_entity_is_a_word() -> None:
    random = np.random.default_rng(0)
    logits, targets = random.normal(size=(9, 7, 3)), random.integers(0, 3, (9, 7))
    targets[random.random((9, 7)) < 0.3] = IGNORED
    names = ("O", "B-A", "B-B")
    present = targets != IGNORED
    chosen, expected = logits.argmax(-1)[present], targets[present]
    found = TASK.score(logits, targets, names)
    f1 = metrics.f1_score(expected, chosen, labels=[1, 2], average="micro")
    assert found == pytest.approx({"f1": f1, "accuracy": metrics.accuracy_score(expected, chosen)}, abs=1e-12)
    right = [
        (row.argmax(-1)[own] == wanted[own]).all() for row, wanted, own in zip(logits, targets, present, strict=True)
    ]
    assert TASK.right(logits, targets).tolist() == right
    nothing = np.zeros_like(logits) + np.eye(3)[0]
    assert TASK.says_nothing(TASK.score(nothing, targets, names)) and not TASK.says_nothing(found)


def test_an_answer_has_the_places_of_what_was_found() -> None:
    text, places = joined(["in", "New", "York", "Ada", "spoke"])
    logits = np.log(np.full((8, 4), 0.1)) + 0.0
    for token, tag, share in ((1, 0, 0.7), (2, 1, 0.7), (4, 2, 0.4), (6, 3, 0.7)):
        logits[token] = np.log([(1 - share) / 3] * 4)
        logits[token, tag] = np.log(share)
    answer = TASK.answer(logits, NAMES, LocatedWords(text, places, (1, 2, 4, 6, NO_TOKEN)))
    assert answer.labels == ("O", "B-LOC", "I-LOC", "B-PER", "O")
    assert answer.spans == (
        Span("New York", "LOC", 3, 11, pytest.approx((0.7 + 0.4) / 2)),
        Span("Ada", "PER", 12, 15, pytest.approx(0.7)),
    )
    assert (answer.label, answer.score) == ("PER", pytest.approx(0.7))
    nothing = TASK.answer(np.log(np.full((8, 4), 0.25)), NAMES, LocatedWords(text, places, (1, 2, 4, 6, NO_TOKEN)))
    assert (nothing.label, nothing.score, nothing.spans) == ("O", pytest.approx(0.25), ())


def test_agreement_leaves_padding_and_absent_labels_out() -> None:
    absent = -np.inf
    first = np.array([[[1.0, 2.0, absent], [3.0, 1.0, absent], [absent] * 3], [[0.0, 1.0, 2.0]] * 3])
    second = np.array([[[2.0, 1.0, absent], [3.0, 1.0, absent], [absent] * 3], [[0.0, 1.0, 2.0]] * 3])
    np.testing.assert_array_equal(TASK.agreement(first, second), [0.5, 1.0])


def test_answers_match_word_by_word() -> None:
    assert TASK.matches(("O", "B-LOC"), ("O", "B-LOC"), NAMES)
    assert not TASK.matches(("B-LOC", "O"), ("O", "B-LOC"), NAMES)
    assert not TASK.matches(("O",), ("O", "O"), NAMES)
