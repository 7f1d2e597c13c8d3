"""Who opens a bundle again on a CPU takes the session that is there: the weights are in memory once."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy.runtime import Device, SwitchableSession, open_bundle
from qrlora_deploy.runtime.sessions.shared import _sessions, shared_session
from tests.runtime.fire import made_up_customer, made_up_inputs
from tests.tolerances import EXACT

MEMORY = """
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from qrlora_deploy.runtime import open_session
from qrlora_deploy.runtime.sessions.shared import shared_session

graph = Path(sys.argv[1])
bundle = SimpleNamespace(manifest=SimpleNamespace(files={graph.name: "digest"}))

def grown(make):
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    opened = [make()]
    before, inputs = resident(), {"x": np.ones((1, 1024), np.float32)}
    opened += [make() for _ in range(4)]
    assert all((it.run(None, inputs)[0] == 1024).all() for it in opened)
    return (resident() - before) // graph.stat().st_size

print(grown(lambda: shared_session(bundle, graph, threads=1)), grown(lambda: open_session(graph, threads=1)))
"""


def test_sessions_of_a_bundle_have_customers_of_their_own_and_one_graph(switchable: Path) -> None:
    bundle, again = open_bundle(switchable), open_bundle(switchable)
    inputs = made_up_inputs(bundle.manifest, 3, 7)
    sessions = [SwitchableSession(it, threads=1) for it in (bundle, again)]
    assert sessions[0].session is sessions[1].session
    alone = SwitchableSession(bundle, Device(configure=lambda _: None), threads=1)
    assert alone.session is not sessions[0].session
    owners = {number: made_up_customer(bundle.manifest, number) for number in range(2)}
    found: dict[int, list[np.ndarray]] = {0: [], 1: []}

    def ask(number: int) -> None:
        sessions[number].load("acme", owners[number])
        found[number] = [sessions[number].predict(inputs, ["acme"] * 3)[0] for _ in range(20)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, owner in owners.items():
        alone.load("acme", owner)
        expected = alone.predict(inputs, ["acme"] * 3)[0]
        assert len(found[number]) == 20
        for logits in found[number]:
            np.testing.assert_allclose(logits, expected, **EXACT)
    labels = np.isfinite(found[0][0])
    assert np.abs(found[0][0][labels] - found[1][0][labels]).max() > 1e-3


def test_a_session_is_shared_where_nothing_differs_and_closed_with_its_last_user(switchable: Path) -> None:
    bundle = open_bundle(switchable)
    session = shared_session(bundle, bundle.model, threads=3)
    assert shared_session(bundle, bundle.model, Device("cpu"), threads=3) is session
    assert shared_session(bundle, bundle.model, threads=2) is not session
    assert shared_session(bundle, bundle.model, Device(provider_options={"use_arena": "0"}), threads=3) is not session
    changed = bundle.manifest.model_copy(update={"files": bundle.manifest.files | {"config.json": "another"}})
    assert shared_session(type(bundle)(bundle.folder, changed), bundle.model, threads=3) is not session
    closed = weakref.ref(session)
    del session
    gc.collect()
    assert closed() is None


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux tells it")
def test_further_sessions_take_no_weights(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="writes a graph by the onnx package")
    helper = onnx.helper
    weight = onnx.numpy_helper.from_array(np.ones((1024, 8192), np.float32), "w")
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, width])
        for name, width in (("x", 1024), ("y", 8192))
    ]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    shared, apart = map(int, done.stdout.split())
    assert shared == 0 and apart >= 3, "four more sessions, in times of the 33 MB of weights"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_opens_a_session_of_its_own(switchable: Path) -> None:
    bundle = open_bundle(switchable)
    session = shared_session(bundle, bundle.model, threads=1)
    with _sessions._lock:
        child = os.fork()
        if not child:
            # Whatever happens, no test of the parent goes on in here.
            try:
                os._exit(int(shared_session(bundle, bundle.model, threads=1) is session))
            finally:
                os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
