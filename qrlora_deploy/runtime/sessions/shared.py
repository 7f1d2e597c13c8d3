"""One ONNX Runtime session for all who open a graph of the same bundle in the same way, while one of them is there.

On a CPU an `InferenceSession` is safe for many threads, and what a run needs for itself is in its binding. So whoever
opens a bundle again takes the session that is open: its weights, which ONNX Runtime lays out anew for each session, are
in memory once.
"""

import threading
import weakref
from pathlib import Path
from typing import Any

from qrlora_deploy.runtime.bundle.bundle import Bundle
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.host.forking import survive_forks
from qrlora_deploy.runtime.sessions.session import open_session


class _Sessions:
    """Those that are open, by what makes two of them the same."""

    def __init__(self) -> None:
        self._forget()
        survive_forks(self)

    def before_fork(self) -> None:
        """Nothing to do: a child has sessions of its own."""

    def after_fork(self, in_child: bool) -> None:
        """A session of the parent has no threads in the child, and the lock may have been held."""
        if in_child:
            self._forget()

    def find(self, bundle: Bundle, graph: Path, device: Device, threads: int | None) -> Any:
        """The session that is open already, or a new one."""
        # All files: a graph may keep weights in any of them that the manifest seals.
        files = tuple(sorted(bundle.manifest.files.items()))
        options = repr(sorted(device.provider_options.items()))
        key = (files, graph.name, device.provider, options, threads)
        # Held while one is opened, or two threads would open it twice.
        with self._lock:
            session = self._open.get(key)
            if session is None:
                session = self._open[key] = open_session(graph, device, threads)
            return session

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._open: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()


_sessions = _Sessions()


def shared_session(
    bundle: Bundle, graph: Path, provider: str | Device = "cpu", threads: int | None = None, cuda_graph: bool = False
) -> Any:
    """Open a graph of a bundle, or take the session that somebody in this process has of it.

    Sessions are shared on a CPU, where all files of the bundle, the provider's options and the number of threads are
    the same; then their runs share these threads, too. A device with `configure` gets a session of its own, and so
    does whoever opens one on a GPU.

    Args:
        bundle: an open bundle.
        graph: its ONNX file.
        provider: as of `open_session`, and so are the others.

    Returns:
        An `onnxruntime.InferenceSession`, whose settings are not to be changed.

    Raises:
        ProviderError: as of `open_session`.
        FileFormatError: ONNX Runtime refuses the graph.
        InputError: so many threads cannot be started.
    """
    device = Device.of(provider)
    if device.on_gpu or device.configure is not None:
        return open_session(graph, provider, threads, cuda_graph)
    return _sessions.find(bundle, graph, device, threads)
