"""Files that a fleet writes become whole, however many signals come while they are written."""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.formats.customer_files import read_customer
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.training.fleet import writing
from qrlora_deploy.training.fleet.customers import Customer
from qrlora_deploy.training.fleet.model import Learnt
from qrlora_deploy.training.fleet.writing import Origin, Trained, Writer
from qrlora_deploy.training.outputs import Outputs
from qrlora_deploy.training.record import Ran
from qrlora_deploy.training.settings import TrainSettings

NAMES = [f"c{number}" for number in range(6)]


def trained(name: str) -> Trained:
    outputs = Outputs(Classification(), ("a", "b"), new=False)
    examples = Examples(["play music"], None, ["a"], name)
    ran = Ran(steps=1, epochs=1.0, metric="accuracy", metrics={}, baseline={}, loss=0.5, device="cpu")
    customer = Customer(name, examples, None, outputs, [0], [], TrainSettings(learning_rate=0.1))
    return Trained(customer, ran, Learnt(np.ones(4, dtype=np.float32), {}))


@pytest.mark.skipif(os.name == "nt", reason="needs SIGUSR1")
def test_a_writer_that_closes_finishes_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closing = threading.Event()

    def write_slowly(coefficients: Coefficients, path: Path) -> None:
        assert closing.wait(20)
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.005)
        write_coefficients(coefficients, path)
        time.sleep(0.1)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "write_coefficients", write_slowly)
    writer = Writer(Origin("base", "0" * 64, "1" * 64, "basis.safetensors"))
    for name in NAMES:
        writer.write(trained(name), tmp_path / f"{name}.safetensors")
    shutdown = writer._threads.shutdown

    def shut_down() -> None:
        closing.set()
        shutdown()

    monkeypatch.setattr(writer._threads, "shutdown", shut_down)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            writer.close()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.safetensors" for name in NAMES]
    assert [read_customer(tmp_path, name).values.tolist() for name in NAMES] == [[1.0] * 4] * len(NAMES)
