"""What is trained of all active customers, one row each, with AdamW's state beside it."""

import torch

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class AdamTable:
    """A parameter `[slots, ...]` fp32 of which every row has an AdamW of its own, without weight decay.

    A row is what one customer trains; rows share nothing. Four numbers are kept for each value: itself,
    its two moments, and what it was in the best epoch.

    Args:
        shape: `(slots, ...)`.
        device: where it lives.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.value = torch.zeros(shape, dtype=torch.float32, device=device).requires_grad_(True)
        self.first, self.second, self.best = (torch.zeros_like(self.value, requires_grad=False) for _ in range(3))

    def enter(self, slots: torch.Tensor, values: torch.Tensor) -> None:
        """Begin anew in some rows.

        Args:
            slots: `[n]` int64.
            values: `[n, ...]`, where they start.
        """
        with torch.no_grad():
            for table in (self.value, self.best):
                table.index_copy_(0, slots, values)
            for table in (self.first, self.second):
                table.index_fill_(0, slots, 0.0)

    def keep(self, slots: torch.Tensor) -> None:
        """Remember the values of some rows as their best."""
        self.best.index_copy_(0, slots, self.value.detach().index_select(0, slots))

    @torch.no_grad()
    def return_to_best(self, slots: torch.Tensor) -> None:
        """Let some rows have their best values again."""
        self.value.index_copy_(0, slots, self.best.index_select(0, slots))

    @torch.no_grad()
    def step(self, rates: torch.Tensor, steps: torch.Tensor) -> None:
        """One step of AdamW in every row, and the gradient is zero again.

        Args:
            rates: `[slots]` fp32 learning rates; 0 leaves the values of a row as they are.
            steps: `[slots]` fp32, how many steps a row has made with this one, at least 1.
        """
        gradient = self.value.grad
        if gradient is None:
            return
        shape = (-1, *[1] * (self.value.dim() - 1))
        # In fp64: 1 - 0.999^t in fp32 would have three digits only in the first steps.
        corrections = [(1 - beta ** steps.double()).view(shape) for beta in BETAS]
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        denominator = (self.second.sqrt() / corrections[1].sqrt().float()).add_(EPSILON)
        sizes = (rates.double().view(shape) / corrections[0]).float()
        self.value.sub_(self.first / denominator * sizes)
        gradient.zero_()
