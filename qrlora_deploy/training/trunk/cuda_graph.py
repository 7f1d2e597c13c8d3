"""One training step as a CUDA graph: small batches cost launches, not arithmetic."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

WARM_UP = 3
"""Runs before a capture, as PyTorch asks for: they choose kernels and fill caches."""


def step_gradients(
    loss_of: Callable[[], torch.Tensor], parameters: Sequence[nn.Parameter]
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """A loss and its gradients, None for a parameter that has no part in it."""
    loss = loss_of()
    return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)


class GraphedStep:
    """Loss and gradients of batches of one shape, replayed.

    Args:
        loss_of: the mean loss of its inputs; must not read a value on the CPU.
        inputs: a batch, for shapes; its values are used in the runs before the capture.
        parameters: read at each replay where they lie, so change them in place.
        pool: memory that several graphs share, which are replayed one after another and whose
            results are used up before the next replay.
    """

    def __init__(
        self,
        loss_of: Callable[..., torch.Tensor],
        inputs: Sequence[torch.Tensor],
        parameters: Sequence[nn.Parameter],
        pool: Any,
    ) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step_gradients(lambda: loss_of(*self.inputs), parameters)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.results = step_gradients(lambda: loss_of(*self.inputs), parameters)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Loss and gradients of a batch; they are overwritten by the next call of any graph."""
        for place, tensor in zip(self.inputs, inputs, strict=True):
            place.copy_(tensor)
        self.graph.replay()
        return self.results
