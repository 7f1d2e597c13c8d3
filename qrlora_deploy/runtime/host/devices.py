"""Where a session runs: the provider, which GPU, and what else ONNX Runtime is to be told."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qrlora_deploy.errors import ProviderError

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


@dataclass(frozen=True)
class Device:
    """Where a session runs. A text such as "cpu", "cuda" or "cuda:1" says the same as its first two fields.

    Attributes:
        provider: "cpu", "cuda" or "tensorrt".
        index: number of the GPU.
        provider_options: for the CUDA provider, or the CPU's, such as {"gpu_mem_limit": 2**30}.
        configure: called with the `onnxruntime.SessionOptions` before the session is made.
    """

    provider: str = "cpu"
    index: int = 0
    provider_options: Mapping[str, Any] = field(default_factory=dict)
    configure: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise ProviderError(f"unknown provider {self.provider!r}; choose from {', '.join(PROVIDERS)}")
        if self.index < 0 or (self.index and self.provider == "cpu"):
            raise ProviderError(f"there is no device {self.index} of the provider {self.provider}")

    @classmethod
    def of(cls, device: "Device | str") -> "Device":
        """From its name.

        Raises:
            ProviderError: there is none of that name.
        """
        if isinstance(device, Device):
            return device
        provider, colon, index = device.partition(":")
        if colon and not (index.isascii() and index.isdecimal() and len(index) < 4):
            raise ProviderError(f"{device!r} is no device; write cuda:1 for the second GPU")
        return cls(provider, int(index or 0))

    @property
    def on_gpu(self) -> bool:
        """Whether tables lie on a GPU."""
        return self.provider != "cpu"
