"""Kinds of errors, which a program decides by: each situation at a session, predictor or store has its own."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy import errors
from qrlora_deploy.errors import QrloraError
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.formats.customer_files import read_customer
from qrlora_deploy.runtime import CustomerStore, Predictor, SwitchableSession, load_packed, open_bundle, open_session
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from tests.runtime.place import INPUTS

SITUATIONS: dict[str, tuple[Callable[[Predictor, Coefficients, Path], object], str]] = {
    "no such customer": (lambda it, customer, folder: it.predict(["rice"], customers=["nobody"]), "unknown_customer"),
    "no such file": (lambda it, customer, folder: read_customer(folder, "nobody"), "unknown_customer"),
    "no name of a customer": (lambda it, customer, folder: read_customer(folder, "../acme"), "malformed_input"),
    "one text": (lambda it, customer, folder: it.predict("rice"), "malformed_input"),
    "a text that is none": (lambda it, customer, folder: it.predict([b"rice"]), "malformed_input"),  # type: ignore[list-item]
    "half a surrogate": (lambda it, customer, folder: it.predict(["\ud83d"]), "malformed_input"),
    "too few customers": (lambda it, customer, folder: it.predict(["a", "b"], customers=[None]), "malformed_input"),
    "too few pairs": (lambda it, customer, folder: it.predict(["a", "b"], ["c"]), "malformed_input"),
    "another basis": (lambda it, customer, folder: load(it, customer, basis_digest="0" * 64), "mismatch"),
    "another task": (lambda it, customer, folder: load(it, customer, task="text-regression"), "mismatch"),
    "another length": (lambda it, customer, folder: load(it, customer, values=np.zeros(3, np.float32)), "mismatch"),
    "other labels": (lambda it, customer, folder: load(it, customer, labels=("x", "y")), "mismatch"),
    "a damaged file": (lambda it, customer, folder: damaged(folder), "bad_file"),
}


def load(predictor: Predictor, customer: Coefficients, **changes: object) -> None:
    assert predictor.switchable is not None
    predictor.switchable.load("acme", replace(customer, **changes))  # type: ignore[arg-type]


def damaged(folder: Path) -> object:
    (folder / "acme.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    return read_customer(folder, "acme")


@pytest.fixture(scope="module")
def predictor(switchable: Path) -> Predictor:
    return Predictor(SwitchableSession(open_bundle(switchable), threads=1))


@pytest.mark.parametrize("situation", SITUATIONS)
def test_each_situation_has_its_kind(
    predictor: Predictor, tiny_customer: Coefficients, tmp_path: Path, situation: str
) -> None:
    action, kind = SITUATIONS[situation]
    with pytest.raises(QrloraError) as caught:
        action(predictor, tiny_customer, tmp_path)
    assert caught.value.kind == kind, caught.value


def test_a_session_that_cannot_answer_here_is_not_ready(switchable: Path) -> None:
    session = SwitchableSession(open_bundle(switchable), threads=1)
    session._lost = True  # as in a forked child of a process with a GPU
    with pytest.raises(errors.NotReadyError) as caught:
        session.predict({}, [None])
    assert caught.value.kind == "not_ready" and caught.value.exit_code == 1


def test_every_class_of_errors_has_a_kind_of_its_own_but_for_those_of_one_family() -> None:
    classes = [it for it in vars(errors).values() if isinstance(it, type) and issubclass(it, QrloraError)]
    kinds = [it.kind for it in classes if it is not errors.BasisMismatchError]
    assert len(kinds) == len(set(kinds)) and errors.BasisMismatchError.kind == errors.MismatchError.kind


WRONG_INPUTS: dict[str, Callable[[dict[str, np.ndarray]], object]] = {
    "lists": lambda inputs: inputs | {"input_ids": inputs["input_ids"].tolist()},
    "floats": lambda inputs: inputs | {"attention_mask": inputs["attention_mask"].astype(np.float32)},
    "int32": lambda inputs: inputs | {"input_ids": inputs["input_ids"].astype(np.int32)},
    "nothing": lambda inputs: inputs | {"input_ids": None},
    "a negative id": lambda inputs: inputs | {"input_ids": inputs["input_ids"] * -1},
    "a negative segment": lambda inputs: inputs | {"token_type_ids": inputs["token_type_ids"] - 1},
    "no mask": lambda inputs: {name: array for name, array in inputs.items() if name != "attention_mask"},
    "one row": lambda inputs: {name: array[0] for name, array in inputs.items()},
    "no tokens": lambda inputs: {name: array[:, :0] for name, array in inputs.items()},
}


@pytest.mark.parametrize("what", WRONG_INPUTS)
def test_arrays_that_no_graph_could_take_are_malformed(predictor: Predictor, what: str) -> None:
    session = predictor.switchable
    assert session is not None
    with pytest.raises(errors.MalformedInputError):
        session.predict(WRONG_INPUTS[what](INPUTS), [None])  # type: ignore[arg-type]


@pytest.mark.parametrize("customers", [None, "acme", 3, {"acme"}])
def test_customers_are_a_list(predictor: Predictor, customers: object) -> None:
    assert predictor.switchable is not None
    with pytest.raises(errors.MalformedInputError, match="customers must be a list"):
        predictor.switchable.predict(INPUTS, customers)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [None, "", 3, b"acme"])
def test_a_customer_has_a_name(predictor: Predictor, tiny_customer: Coefficients, name: object) -> None:
    assert predictor.switchable is not None
    with pytest.raises(errors.MalformedInputError, match="a customer is called by a text"):
        predictor.switchable.load(name, tiny_customer)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -1, 2.0, "8", None, True])
def test_a_batch_size_is_a_whole_number(predictor: Predictor, size: object) -> None:
    with pytest.raises(errors.InputError, match="the batch size must be a whole number of at least 1"):
        predictor.predict(["rice"], batch_size=size)  # type: ignore[arg-type]


def test_places_may_be_texts(switchable: Path, tiny_customer: Coefficients, tmp_path: Path) -> None:
    write_coefficients(tiny_customer, tmp_path / "acme.safetensors")
    bundle = open_bundle(str(switchable))
    write_packed([("bolt", tiny_customer)], tmp_path / "packed", bundle.manifest)
    session = SwitchableSession(bundle, threads=1)
    session.load("cafe", str(tmp_path / "acme.safetensors"))
    assert load_packed(session, str(tmp_path / "packed")) == 1
    with CustomerStore(session, str(tmp_path)):
        found = session.predict(
            {name: np.repeat(array, 3, axis=0) for name, array in INPUTS.items()}, ["acme", "bolt", "cafe"]
        )[0]
    assert (found == found[0]).all()
    assert open_session(str(switchable / "model.onnx"), threads=1).get_inputs()
