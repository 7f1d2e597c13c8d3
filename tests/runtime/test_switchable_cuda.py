"""The switchable session on a GPU: the same answers as on the CPU, from one buffer on the device."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy.coefficients import Coefficients
from qrlora_deploy.errors import ProviderError
from qrlora_deploy.runtime import SwitchableSession, open_bundle, verify
from qrlora_deploy.runtime.tokenizing import TextEncoder
from tests.tiny import SENTENCES
from tests.tolerances import FP32_ONNX

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def sessions(switchable: Path) -> tuple[SwitchableSession, SwitchableSession]:
    bundle = open_bundle(switchable)
    try:
        return SwitchableSession(bundle, rows=4), SwitchableSession(bundle, "cuda", rows=4)
    except ProviderError as error:
        pytest.skip(f"no CUDA execution provider here: {error}")


def test_parity_on_cuda(switchable: Path) -> None:
    try:
        report = verify(open_bundle(switchable), "cuda")
    except ProviderError as error:
        pytest.skip(f"no CUDA execution provider here: {error}")
    assert report.passed, report


def test_mixed_rows_growth_and_swaps_equal_the_cpu(
    sessions: tuple[SwitchableSession, SwitchableSession], tiny_customer: Coefficients
) -> None:
    host, device = sessions
    random = np.random.default_rng(5)
    inputs = TextEncoder(host.bundle).encode(SENTENCES)
    names: list[str | None] = [None, *(f"c{index}" for index in range(len(SENTENCES) - 1))]
    answers = []
    for _ in range(3):
        for name in names[1:]:
            values = random.normal(size=tiny_customer.values.shape).astype(np.float32)
            for session in sessions:
                session.load(str(name), replace(tiny_customer, values=values))
        found = device.run(inputs, names)[0]
        np.testing.assert_allclose(found, host.run(inputs, names)[0], **FP32_ONNX)
        answers.append(found)
    np.testing.assert_array_equal(answers[0][0], answers[2][0])
    assert (np.abs(answers[0][1:, :4] - answers[2][1:, :4]).max(axis=1) > 1e-3).all()
    assert device.table.memory.rows > 4


def test_back_to_the_first_version_is_exact_on_cuda(
    sessions: tuple[SwitchableSession, SwitchableSession], tiny_customer: Coefficients
) -> None:
    device = sessions[1]
    inputs = TextEncoder(device.bundle).encode(SENTENCES[:2])
    other = replace(tiny_customer, values=-tiny_customer.values)
    answers = []
    for version in (tiny_customer, other, tiny_customer):
        device.load("acme", version)
        answers.append(device.run(inputs, ["acme", None])[0])
    np.testing.assert_array_equal(answers[0], answers[2])
    assert np.abs(answers[0][0, :4] - answers[1][0, :4]).max() > 1e-3
