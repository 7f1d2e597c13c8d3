"""Kinds of errors, which a program decides by: each situation at a session, predictor or store has its own."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy import errors
from qrlora_deploy.errors import QrloraError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.formats.customer_files import read_customer
from qrlora_deploy.runtime import Predictor, SwitchableSession, open_bundle

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
