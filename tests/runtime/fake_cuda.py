"""A CUDA runtime of plain memory: what the table asks of the real one, and what it must never do."""

import ctypes
from typing import Any

import pytest

from qrlora_deploy.runtime.table import cuda

INVALID, OUT_OF_MEMORY, NO_DEVICE, CAPTURE_UNSAFE = 1, 2, 100, 900
GLOBAL_MODE = 0


class FakeCuda:
    """Functions of the CUDA runtime, by their names, that copy between pieces of the host's memory.

    A copy is not there before its stream was asked often enough, or waited for. Calls that are unsafe
    while another thread captures are refused outside of the relaxed mode.

    Attributes:
        queries: how often a copy is "not ready" before it is there.
        calls: names of the functions that were called, in order.
        arrived: copies that are there.
        limit_bytes: of one allocation.
        devices: how many GPUs there are.
        used: numbers of those that were used.
    """

    def __init__(self, queries: int = 2, limit_bytes: int = 2**30) -> None:
        self.queries, self.limit_bytes = queries, limit_bytes
        self.devices, self.used = 1, set[int]()
        self.calls: list[str] = []
        self.arrived = 0
        self.mode = GLOBAL_MODE
        self.last_error = 0
        self._pieces: dict[int, Any] = {}
        self._pending: list[tuple[int, int, int]] = []
        self._asked = 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            plain = [getattr(item, "value", item) for item in arguments]
            code: int = getattr(self, f"_{name[4:].lower()}")(*plain)
            # Asking for the last error is no error.
            if name != "cudaGetLastError":
                self.last_error = code or self.last_error
            return code

        return call

    def install(self, patch: pytest.MonkeyPatch) -> "FakeCuda":
        """Take the place of the library in `qrlora_deploy.runtime.table.cuda`."""
        patch.setattr(cuda, "cuda_runtime", lambda: self)
        patch.setattr(cuda, "held_cuda_runtime", lambda: self)
        return self

    def _threadexchangestreamcapturemode(self, mode: Any) -> int:
        mode._obj.value, self.mode = self.mode, mode._obj.value
        return 0

    def _setdevice(self, device: int) -> int:
        self.used.add(device)
        return 0 if device < self.devices else INVALID

    def _getdevicecount(self, count: Any) -> int:
        count._obj.value = self.devices
        return 0 if self.devices else NO_DEVICE

    def _streamcreatewithflags(self, stream: Any, flags: int) -> int:
        return self._allocate(stream, 8)

    def _streamdestroy(self, stream: int) -> int:
        return self._free(stream)

    def _malloc(self, place: Any, size_bytes: int) -> int:
        return self._allocate(place, size_bytes)

    def _hostalloc(self, place: Any, size_bytes: int, flags: int) -> int:
        return self._allocate(place, size_bytes)

    def _allocate(self, place: Any, size_bytes: int) -> int:
        if self.mode != cuda.RELAXED:
            return CAPTURE_UNSAFE
        if size_bytes > self.limit_bytes:
            return OUT_OF_MEMORY
        # Not zero: nobody may rely on it.
        piece = ctypes.create_string_buffer(b"\xee" * size_bytes, size_bytes)
        address = ctypes.addressof(piece)
        self._pieces[address] = piece
        place._obj.value = address
        return 0

    def _free(self, address: int) -> int:
        return 0 if self._pieces.pop(address, None) is not None else INVALID

    def _freehost(self, address: int) -> int:
        return self._free(address)

    def _memcpyasync(self, target: int, source: int, size_bytes: int, kind: int, stream: int) -> int:
        self._pending.append((target, source, size_bytes))
        self._asked = 0
        return 0

    def _memcpy2dasync(
        self, target: int, to: int, source: int, of: int, size_bytes: int, count: int, kind: int, stream: int
    ) -> int:
        if count and (size_bytes > to or size_bytes > of):
            return INVALID
        self._pending += [(target + to * piece, source + of * piece, size_bytes) for piece in range(count)]
        self._asked = 0
        return 0

    def _memsetasync(self, target: int, value: int, size_bytes: int, stream: int) -> int:
        ctypes.memset(target, value, size_bytes)
        return 0

    def _streamquery(self, stream: int) -> int:
        if self.mode != cuda.RELAXED:
            return CAPTURE_UNSAFE
        self._asked += 1
        return cuda.NOT_READY if self._asked <= self.queries else self._streamsynchronize(stream)

    def _streamsynchronize(self, stream: int) -> int:
        for target, source, size_bytes in self._pending:
            ctypes.memmove(target, source, size_bytes)
            self.arrived += 1
        self._pending.clear()
        return 0

    def _getlasterror(self) -> int:
        found, self.last_error = self.last_error, 0
        return found

    def _memgetinfo(self, free: Any, total: Any) -> int:
        free._obj.value = self.limit_bytes
        return 0
