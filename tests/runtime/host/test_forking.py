"""A process that is forked: its store, its table and its buckets go on in the child."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime.host.forking import survive_forks
from tests.runtime.place import DEADLINE_S, Place

CODE = """
import json, os, sys, threading, time
from dataclasses import replace
from pathlib import Path
import numpy as np
from qrlora_deploy.formats.coefficients import read_coefficients, write_coefficients
from qrlora_deploy.runtime import Buckets, CustomerStore, SwitchableSession, open_bundle
from qrlora_deploy.runtime.customers import store as store_module
from tests.runtime.place import INPUTS

bundle, folder = open_bundle(Path(sys.argv[1])), Path(sys.argv[2])
poll, deadline_s = sys.argv[3] == "True", float(sys.argv[4])
one = read_coefficients(folder / "acme.safetensors")
versions = {number: replace(one, values=one.values * np.float32(number)) for number in (1, 2, 3)}
buckets = Buckets(batches=(1,), lengths=(8,))

def logits(session, name):
    return session.predict(INPUTS, [name])[0][0].tolist()

other = SwitchableSession(bundle, threads=1, buckets=buckets)
expected = {}
for number, version in versions.items():
    other.load("it", version)
    expected[number] = logits(other, "it")

session = SwitchableSession(bundle, threads=1, buckets=buckets)
events = []
store = CustomerStore(session, folder, events.append, poll=poll)
store.start()
assert logits(session, "acme") == expected[1]

# A thread of the parent reads a customer at the time of the fork, and holds its lock.
parent, reading, done = os.getpid(), threading.Event(), threading.Event()
read = store_module.read_customer
def slow(folder, customer):
    if customer == "slow" and os.getpid() == parent:
        reading.set()
        done.wait(deadline_s)
    return read(folder, customer)
store_module.read_customer = slow
write_coefficients(versions[3], folder / "slow.safetensors")
asks = threading.Thread(target=logits, args=(session, "slow"))
asks.start()
reading.wait(deadline_s)

def wait_for(name, number):
    end = time.monotonic() + deadline_s
    while logits(session, name) != expected[number]:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True

(from_child, to_parent), (from_parent, to_child) = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    threads = sorted(thread.name for thread in threading.enumerate() if "folder" in thread.name)
    found = {"slow": wait_for("slow", 3), "threads": threads}
    os.write(to_parent, b"r")
    found["changed"] = wait_for("acme", 2)
    os.unlink(folder / "slow.safetensors")
    end = time.monotonic() + deadline_s
    while "slow" in session.customers() and time.monotonic() < end:
        time.sleep(0.01)
    found["left"] = session.customers()
    store.close()
    write_coefficients(versions[3], folder / "acme.safetensors")
    store.start()
    found["again"] = wait_for("acme", 3)
    store.close()
    os.write(to_parent, json.dumps(found).encode())
    os._exit(0)
os.read(from_child, 1)
write_coefficients(versions[2], folder / "acme.safetensors")
done.set()
text = b""
while not text.endswith(b"}"):
    part = os.read(from_child, 65536)
    if not part:
        break
    text += part
os.waitpid(child, 0)
asks.join()
found = json.loads(text)
found["parent"] = wait_for("acme", 3)
store.close()
print(json.dumps(found))
"""


@pytest.mark.parametrize("poll", [False, True], ids=["told", "compared"])
def test_a_store_goes_on_in_a_forked_child(place: Place, poll: bool) -> None:
    place.put("acme", 1)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, str(place.bundle), str(place.folder), str(poll), str(DEADLINE_S)],
        capture_output=True,
        text=True,
        timeout=12 * DEADLINE_S,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "slow": True,
        "threads": ["folder-reader", "folder-watcher"],
        "changed": True,
        "left": ["acme"],
        "again": True,
        "parent": True,
    }


def test_a_session_on_a_gpu_refuses_in_a_forked_child(place: Place) -> None:
    place.session.load("acme", place.version(1))
    place.session.after_fork(in_child=True)
    assert place.logits("acme") == place.expected(1), "on a processor it goes on"
    place.session._on_gpu = True
    place.session.after_fork(in_child=False)
    assert place.logits("acme") == place.expected(1), "so it does in the parent"
    place.session.after_fork(in_child=True)
    for call in (
        lambda: place.logits("acme"),
        lambda: place.session.load("acme", place.version(2)),
        lambda: place.session.holds("acme", place.version(1)),
    ):
        with pytest.raises(QrloraError, match="open it after the fork"):
            call()


def test_who_is_gone_is_not_asked() -> None:
    class Item:
        def before_fork(self) -> None:
            raise AssertionError("nobody refers to it")

        def after_fork(self, in_child: bool) -> None:
            raise AssertionError("nobody refers to it")

    from qrlora_deploy.runtime.host import forking

    survive_forks(Item())
    forking._before()
    forking._after(in_child=False)
