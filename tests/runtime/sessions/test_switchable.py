"""What a switchable session promises: each row is its own customer's, and nobody notices the others."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrlora_deploy.errors import BasisMismatchError, InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime import Bundle, SwitchableSession, open_bundle, open_session
from qrlora_deploy.runtime.bundle.row_layout import HEAD_TABLE, SLOT, TABLE
from tests.runtime.fire import made_up_customer, made_up_inputs
from tests.tiny import LABELS
from tests.tolerances import EXACT, FP32_ONNX

OUTPUTS = 6
HEADS = (None, 2, 3, 4, 5, 6)
"""Labels of the customers' own heads, in turn; None uses the base's head."""

Inputs = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def bundle(switchable: Path) -> Bundle:
    return open_bundle(switchable)


@pytest.fixture(scope="module")
def crowd(bundle: Bundle) -> dict[str, Coefficients]:
    """64 customers with heads of every width, and without."""
    return {f"c{number}": made_up_customer(bundle.manifest, number, HEADS[number % len(HEADS)]) for number in range(64)}


@pytest.fixture(scope="module")
def served(bundle: Bundle, crowd: dict[str, Coefficients]) -> SwitchableSession:
    """A session with the crowd; tests leave its customers as they are."""
    session = SwitchableSession(bundle, threads=1)
    for name, coefficients in crowd.items():
        session.load(name, coefficients)
    return session


@pytest.fixture
def session(bundle: Bundle) -> SwitchableSession:
    return SwitchableSession(bundle, rows=4, threads=1)


@pytest.fixture(scope="module")
def inputs(bundle: Bundle) -> Inputs:
    """64 texts of 12 tokens; from the tenth on they end in padding, each at another place."""
    made = made_up_inputs(bundle.manifest, 64, 12)
    for row in range(10, 64):
        length = 3 + row % 9
        made["input_ids"][row, length:] = bundle.manifest.pad_token_id
        made["attention_mask"][row, length:] = 0
    return made


def rows(inputs: Inputs, which: Sequence[int] | slice | np.ndarray) -> Inputs:
    return {name: values[which] for name, values in inputs.items()}


def one(session: SwitchableSession, inputs: Inputs, customer: str | None) -> np.ndarray:
    return session.predict(rows(inputs, [0]), [customer])[0][0]


def assert_equal_rows(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the tolerance of ONNX Runtime; labels that do not exist are -inf in both."""
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(found, expected, **FP32_ONNX)


# --- Laws -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_permuting_rows_permutes_answers(served: SwitchableSession, inputs: Inputs, data: st.DataObject) -> None:
    names = st.one_of(st.none(), st.sampled_from(served.customers()))
    customers = data.draw(st.lists(names, min_size=1, max_size=12), label="customers")
    texts = np.array(data.draw(st.lists(st.integers(0, 63), min_size=len(customers), max_size=len(customers))))
    order = data.draw(st.permutations(range(len(customers))), label="order")
    logits, labels = served.predict(rows(inputs, texts), customers)
    permuted, permuted_labels = served.predict(rows(inputs, texts[order]), [customers[index] for index in order])
    assert_equal_rows(permuted, logits[order])
    assert permuted_labels == [labels[index] for index in order]


@pytest.mark.parametrize("seed", range(5))
def test_exchanging_two_customers_exchanges_only_their_answers(
    served: SwitchableSession, inputs: Inputs, seed: int
) -> None:
    random = np.random.default_rng(seed)
    names = list(random.choice(served.customers(), 8, replace=False))
    same_text = rows(inputs, [seed] * 8)
    before, _ = served.predict(same_text, names)
    first, second = random.choice(8, 2, replace=False)
    names[first], names[second] = names[second], names[first]
    after, _ = served.predict(same_text, names)
    order = np.arange(8)
    order[[first, second]] = second, first
    assert_equal_rows(after, before[order])
    assert not np.array_equal(after[first], before[first])


@pytest.mark.parametrize("own_labels", HEADS)
def test_back_to_the_first_version_is_exact(
    session: SwitchableSession, bundle: Bundle, inputs: Inputs, own_labels: int | None
) -> None:
    first, second = (made_up_customer(bundle.manifest, seed, own_labels) for seed in (1, 2))
    session.load("acme", first)
    before, _ = session.predict(rows(inputs, slice(4)), ["acme"] * 4)
    session.load("acme", second)
    between, _ = session.predict(rows(inputs, slice(4)), ["acme"] * 4)
    session.load("acme", first)
    after, _ = session.predict(rows(inputs, slice(4)), ["acme"] * 4)
    np.testing.assert_allclose(after, before, **EXACT)
    assert (before[:, :2] != between[:, :2]).any(axis=1).all()


def test_a_new_head_may_be_narrower_or_none(session: SwitchableSession, bundle: Bundle, inputs: Inputs) -> None:
    fresh = SwitchableSession(bundle, threads=1)
    for seed, own_labels in enumerate((6, 2, None, 5, None)):
        version = made_up_customer(bundle.manifest, seed, own_labels)
        session.load("acme", version)
        fresh.load(f"only {seed}", version)
        logits, labels = session.predict(rows(inputs, [0]), ["acme"])
        assert np.isfinite(logits[0]).sum() == len(labels[0]) == (own_labels or len(LABELS))
        assert labels[0] == version.labels
        np.testing.assert_allclose(logits[0], one(fresh, inputs, f"only {seed}"), **EXACT)


@pytest.mark.parametrize("length", [13, 20, 64])
def test_padding_on_the_right_changes_nothing(
    served: SwitchableSession, bundle: Bundle, inputs: Inputs, length: int
) -> None:
    fill = {"input_ids": bundle.manifest.pad_token_id, "token_type_ids": bundle.manifest.pad_token_type_id}
    wider = {
        name: np.pad(values, ((0, 0), (0, length - 12)), constant_values=fill.get(name, 0))
        for name, values in inputs.items()
    }
    names = served.customers()
    assert_equal_rows(served.predict(wider, names)[0], served.predict(inputs, names)[0])


def test_64_customers_in_one_batch_equal_64_runs(
    served: SwitchableSession, crowd: dict[str, Coefficients], inputs: Inputs
) -> None:
    logits, labels = served.predict(inputs, list(crowd))
    assert logits.shape == (64, OUTPUTS) and logits.dtype == np.float32
    for row, (name, coefficients) in enumerate(crowd.items()):
        # Its padding is cut off as well: alone a text needs none.
        length = int(inputs["attention_mask"][row].sum())
        alone = {key: values[[row], :length] for key, values in inputs.items()}
        assert_equal_rows(logits[row], served.predict(alone, [name])[0][0])
        assert labels[row] == coefficients.labels
        assert np.isfinite(logits[row]).sum() == len(coefficients.labels)
        assert np.isneginf(logits[row, len(coefficients.labels) :]).all()


def test_no_two_customers_answer_alike(served: SwitchableSession, inputs: Inputs) -> None:
    """Were two rows of the table exchanged, the tests here would see it."""
    names = served.customers()
    logits, _ = served.predict(rows(inputs, [0] * 64), names)
    distances = np.abs(logits[:, None, :2] - logits[None, :, :2]).max(axis=2) + np.eye(64)
    assert distances.min() > 10 * FP32_ONNX["atol"]


# --- Against the plain graph and PyTorch ------------------------------------------------------------------------------


def test_no_customer_is_the_base(served: SwitchableSession, bundle: Bundle, inputs: Inputs) -> None:
    """The same graph, with a table made here: zeros, and the base's head in row 0."""
    import safetensors.numpy

    head = safetensors.numpy.load_file(bundle.folder / "base_head.safetensors")
    weight = next(array for array in head.values() if array.ndim == 2)
    bias = next(array for array in head.values() if array.ndim == 1)
    head_row = np.zeros((1, OUTPUTS * 33), dtype=np.float32)
    head_row[0, : weight.size] = weight.reshape(-1)
    head_row[0, -OUTPUTS:] = [*bias, *[-np.inf] * (OUTPUTS - len(bias))]
    tables = {TABLE: np.zeros((1, served.layout.width), dtype=np.float32), HEAD_TABLE: head_row}
    plain = open_session(bundle.model, threads=1)
    expected = plain.run(["logits"], inputs | tables | {SLOT: np.zeros(64, dtype=np.int64)})[0]
    logits, labels = served.predict(inputs, [None] * 64)
    np.testing.assert_allclose(logits, expected, **EXACT)
    assert labels == [LABELS] * 64
    # Beside customers, too.
    mixed, _ = served.predict(inputs, [None, "c1"] * 32)
    assert_equal_rows(mixed[::2], expected[::2])


def test_zero_coefficients_are_the_base(session: SwitchableSession, bundle: Bundle, inputs: Inputs) -> None:
    nothing = made_up_customer(bundle.manifest, 0)
    session.load("acme", replace(nothing, values=np.zeros_like(nothing.values)))
    np.testing.assert_allclose(one(session, inputs, "acme"), one(session, inputs, None), **EXACT)


@pytest.mark.makes
def test_rows_equal_the_side_branch_of_pytorch(
    served: SwitchableSession, crowd: dict[str, Coefficients], tiny_base: Path, tiny_basis: Basis, inputs: Inputs
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    from qrlora_deploy.models.adapter import attach, set_coefficients

    names = list(crowd)[:18]
    found, _ = served.predict(inputs, [*names, *[None] * 46])
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, attn_implementation="eager").eval()
    adapters = attach(model, tiny_basis)
    head = model.classifier
    base_weight, base_bias = head.weight.detach().clone(), head.bias.detach().clone()
    tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
    for row, name in enumerate([*names, None]):
        customer = crowd.get(name) if name else None
        values = customer.values if customer else np.zeros(tiny_basis.total_rank, dtype=np.float32)
        set_coefficients(adapters, tiny_basis, values)
        own = customer.head if customer else {}
        with torch.no_grad():
            head.weight.data = torch.tensor(own["classifier.weight"]) if own else base_weight
            head.bias.data = torch.tensor(own["classifier.bias"]) if own else base_bias
            expected = model(**{key: tensor[[row]] for key, tensor in tensors.items()}).logits[0].numpy()
        np.testing.assert_allclose(found[row, : len(expected)], expected, **FP32_ONNX)
        assert np.isneginf(found[row, len(expected) :]).all()


# --- What is refused, and that the old version stays ------------------------------------------------------------------


def with_head(coefficients: Coefficients, labels: int, shape: tuple[int, ...], bias: int) -> Coefficients:
    head = {"classifier.weight": np.ones(shape, np.float32), "classifier.bias": np.zeros(bias, np.float32)}
    return replace(coefficients, labels=tuple(map(str, range(labels))), head=head)


Spoil = Callable[[Coefficients], Coefficients]
SPOILT: dict[str, tuple[Spoil, type[InputError], str]] = {
    "another basis": (lambda c: replace(c, basis_digest="0" * 64), BasisMismatchError, "trained on basis 000000000000"),
    "another base": (lambda c: replace(c, base_digest="1" * 64), BasisMismatchError, "trained on base 111111111111"),
    "another task": (lambda c: replace(c, task="text-regression"), InputError, "is a text-regression, the bundle a"),
    "other labels": (lambda c: replace(c, labels=c.labels[::-1]), InputError, "other labels than the bundle"),
    "too few labels": (lambda c: replace(c, labels=c.labels[:2]), InputError, "other labels than the bundle"),
    "too many labels": (lambda c: with_head(c, 7, (7, 32), 7), InputError, "7 labels, the bundle room for 6"),
    "narrow head": (lambda c: with_head(c, 3, (3, 31), 3), InputError, r"shapes \[3, 31\] and \[3\]"),
    "wide head": (lambda c: with_head(c, 3, (3, 33), 3), InputError, r"not \[3, 32\]"),
    "head of fewer labels": (lambda c: with_head(c, 4, (3, 32), 3), InputError, "4 labels but a head for 3"),
    "head of more labels": (lambda c: with_head(c, 2, (3, 32), 3), InputError, "2 labels but a head for 3"),
    "head of no label": (lambda c: with_head(c, 0, (0, 32), 0), InputError, "a head has 0 labels"),
    "bias of another length": (lambda c: with_head(c, 3, (3, 32), 2), InputError, r"\[3, 32\] and \[2\]"),
    "bias alone": (lambda c: with_head(c, 3, (3,), 3), InputError, "one linear layer"),
    "two layers": (
        lambda c: replace(c, head={"a.weight": np.ones((4, 32), np.float32), "b.weight": np.ones((4, 32), np.float32)}),
        InputError,
        "one linear layer, not a.weight, b.weight",
    ),
    "too short": (lambda c: replace(c, values=c.values[:-1]), InputError, "expected 35 coefficients, not 34"),
    "too long": (lambda c: replace(c, values=np.append(c.values, c.values[:1])), InputError, "not 36"),
    "one number": (lambda c: replace(c, values=c.values[:1]), InputError, "not 1"),
}


@pytest.mark.parametrize("as_file", [False, True], ids=["object", "file"])
@pytest.mark.parametrize(("spoil", "error", "message"), SPOILT.values(), ids=SPOILT)
def test_wrong_customer_is_refused_and_the_old_version_serves(
    served: SwitchableSession,
    crowd: dict[str, Coefficients],
    inputs: Inputs,
    tmp_path: Path,
    spoil: Spoil,
    error: type[InputError],
    message: str,
    as_file: bool,
) -> None:
    before = served.predict(inputs, list(crowd))
    wrong: Coefficients | Path = spoil(replace(crowd["c0"], values=-crowd["c0"].values))
    if as_file:
        assert isinstance(wrong, Coefficients)
        write_coefficients(wrong, tmp_path / "wrong.safetensors")
        wrong = tmp_path / "wrong.safetensors"
        message = f"wrong.safetensors.*{message}"
    for name in ("c0", "newcomer"):
        with pytest.raises(error, match=message) as caught:
            served.load(name, wrong)
        assert "\n" not in str(caught.value)
    after = served.predict(inputs, list(crowd))
    np.testing.assert_allclose(after[0], before[0], **EXACT)
    assert after[1] == before[1]
    assert served.customers() == list(crowd)


def test_missing_and_damaged_files_are_refused(
    session: SwitchableSession, tiny_customer_file: Path, tmp_path: Path, inputs: Inputs
) -> None:
    session.load("acme", tiny_customer_file)
    before = one(session, inputs, "acme")
    damaged = tmp_path / "cut.safetensors"
    damaged.write_bytes(tiny_customer_file.read_bytes()[:-1])
    for path in (damaged, tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(InputError, match=path.name) as caught:
            session.load("acme", path)
        assert "\n" not in str(caught.value)
    np.testing.assert_allclose(one(session, inputs, "acme"), before, **EXACT)


def test_unknown_customer_is_refused_in_one_line(served: SwitchableSession, inputs: Inputs) -> None:
    with pytest.raises(InputError, match="no customer is called 'nob\\\\ndy'; load it first") as caught:
        served.predict(rows(inputs, [0, 1, 2]), ["c0", "nob\ndy", None])
    assert "\n" not in str(caught.value)
    # What the batch held before is given back.
    assert served.table._use.holders == {}


def test_an_unloaded_customer_is_unknown(session: SwitchableSession, bundle: Bundle, inputs: Inputs) -> None:
    session.load("acme", made_up_customer(bundle.manifest, 1))
    session.load("bolt", made_up_customer(bundle.manifest, 2, 3))
    assert session.customers() == ["acme", "bolt"]
    assert session.unload("acme") and not session.unload("acme")
    assert session.customers() == ["bolt"]
    with pytest.raises(InputError, match="no customer is called 'acme'"):
        one(session, inputs, "acme")
    assert np.isfinite(one(session, inputs, "bolt")[:3]).all()


def test_a_merged_bundle_is_refused(exported: Path) -> None:
    with pytest.raises(InputError, match="is a merged bundle; export a switchable one"):
        SwitchableSession(open_bundle(exported))


def test_inputs_that_do_not_fit_are_refused(served: SwitchableSession, inputs: Inputs) -> None:
    three = rows(inputs, slice(3))
    wrong = {
        "3 customers need": three | {"attention_mask": three["attention_mask"][:, :-1]},
        "the inputs lack attention_mask": {key: value for key, value in three.items() if key != "attention_mask"},
        r"not \[\(12,\)\]": {key: value[0] for key, value in three.items()},
        r"not \[\(2, 12\)\]": rows(inputs, slice(2)),
        r"not \[\(4, 12\)\]": rows(inputs, slice(4)),
        r"not \[\(3, 12, 1\)\]": {key: value[:, :, None] for key, value in three.items()},
        "the inputs are empty": {key: value[:, :0] for key, value in three.items()},
    }
    for message, batch in wrong.items():
        with pytest.raises(InputError, match=message) as caught:
            served.predict(batch, ["c0", "c1", None])
        assert "\n" not in str(caught.value)
    assert served.table._use.holders == {}


def test_an_empty_batch_is_refused(served: SwitchableSession, inputs: Inputs) -> None:
    with pytest.raises(InputError, match="the inputs are empty"):
        served.predict(rows(inputs, slice(0)), [])


def test_inputs_may_lie_in_memory_in_any_order(served: SwitchableSession, inputs: Inputs) -> None:
    names = served.customers()
    transposed = {name: np.asfortranarray(values) for name, values in inputs.items()}
    backwards = {name: values[::-1] for name, values in inputs.items()}
    expected = served.predict(inputs, names)[0]
    np.testing.assert_allclose(served.predict(transposed, names)[0], expected, **EXACT)
    assert_equal_rows(served.predict(backwards, names[::-1])[0], expected[::-1])


def test_answers_stay_what_they_were(session: SwitchableSession, bundle: Bundle, inputs: Inputs) -> None:
    """The arrays given back are the caller's: later runs and versions do not change them."""
    session.load("acme", made_up_customer(bundle.manifest, 1))
    given, _ = session.predict(rows(inputs, slice(8)), ["acme"] * 8)
    copy = given.copy()
    session.load("acme", made_up_customer(bundle.manifest, 2))
    session.predict(rows(inputs, slice(8)), ["acme"] * 8)
    np.testing.assert_array_equal(given, copy)


# --- Growth and bounds ------------------------------------------------------------------------------------------------


def test_the_table_grows_under_running_threads(bundle: Bundle, inputs: Inputs) -> None:
    """From one customer to 200 while four threads ask for those that are there."""
    made = {f"g{number}": made_up_customer(bundle.manifest, 1000 + number, HEADS[number % 6]) for number in range(200)}
    alone = SwitchableSession(bundle, rows=256, threads=1)
    for name, coefficients in made.items():
        alone.load(name, coefficients)
    expected = {name: one(alone, inputs, name) for name in made}
    session = SwitchableSession(bundle, rows=2, threads=1)
    loaded: list[str] = []
    wrong: list[str] = []
    checked: list[int] = []
    done = threading.Event()

    def ask(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            while not done.is_set():
                there = len(loaded)
                names: list[str | None] = [
                    None if index < 0 else loaded[index] for index in random.integers(-1, there, 8)
                ]
                found, labels = session.predict(rows(inputs, [0] * 8), names)
                for name, logits, its_labels in zip(names, found, labels, strict=True):
                    if name is not None and its_labels != made[name].labels:
                        wrong.append(f"{name} has the labels {its_labels}")
                    answer = base if name is None else expected[name]
                    if not np.allclose(logits, answer, **FP32_ONNX):
                        wrong.append(f"{name} of {there}: {logits}, not {answer}")
                checked.append(8)
        except BaseException as error:
            wrong.append(repr(error))

    base = one(session, inputs, None)
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for name, coefficients in made.items():
        rounds = len(checked)
        session.load(name, coefficients)
        loaded.append(name)
        # So that runs lie between all the growths.
        while len(checked) == rounds and not wrong:
            done.wait(0.0005)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert session.table.memory.rows == 256 and session.customers().__len__() == 200
    for name, answer in expected.items():
        assert_equal_rows(one(session, inputs, name), answer)


def test_a_full_table_forgets_the_customer_that_was_not_asked_for_longest(bundle: Bundle, inputs: Inputs) -> None:
    session = SwitchableSession(bundle, rows=2, max_rows=4, threads=1)
    for seed, name in enumerate(("acme", "bolt", "cargo")):
        session.load(name, made_up_customer(bundle.manifest, seed))
    kept = one(session, inputs, "acme")
    session.load("delta", made_up_customer(bundle.manifest, 9))
    assert sorted(session.customers()) == ["acme", "cargo", "delta"]
    with pytest.raises(InputError, match="no customer is called 'bolt'"):
        one(session, inputs, "bolt")
    np.testing.assert_allclose(one(session, inputs, "acme"), kept, **EXACT)


def test_a_table_may_be_bounded_by_fewer_rows_than_it_begins_with(bundle: Bundle) -> None:
    assert SwitchableSession(bundle, max_rows=2, threads=1).table.memory.rows == 2


@pytest.mark.parametrize(("first", "most"), [(1, None), (0, None), (8, 4)])
def test_numbers_of_rows_that_make_no_sense_are_refused(bundle: Bundle, first: int, most: int | None) -> None:
    with pytest.raises(InputError, match="at least 2 rows"):
        SwitchableSession(bundle, rows=first, max_rows=most)
