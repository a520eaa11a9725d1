"""Learning gates: AdamW on tau, a step forward and the slope of a sigmoid backward.

Nodes (`extractor.prune`) and edges (`extractor.refine`) are learned alike. (Gao et al. 2025, appendix A.5.)
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0

# (step, gates, parts that are open or may still open) -> every setting's loss
Objective = Callable[[int, Tensor, Tensor], Tensor]


class HeavisideStep(torch.autograd.Function):
    """1 where tau > 0, with the gradient of sigmoid(tau / temperature)."""

    @staticmethod
    def forward(ctx, tau: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(tau)
        ctx.temperature = temperature
        return (tau > 0).to(tau.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (tau,) = ctx.saved_tensors
        gate = torch.sigmoid(tau / ctx.temperature)
        return gradient * gate * (1 - gate) / ctx.temperature, None


def learn_gates(
    tau: Float[Tensor, "setting part"],
    objective: Objective,
    *,
    steps: int,
    learning_rate: float,
    temperature: float = 1.0,
) -> None:
    """Minimise every setting's loss over its own tau, in place; the rate falls linearly to zero.

    The settings do not touch each other: learned together or one by one, they end alike.
    """
    tau.requires_grad_()
    optimizer = torch.optim.AdamW([tau], lr=learning_rate, betas=BETAS, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        may_open = can_open(tau.detach(), step, steps, learning_rate)
        losses = objective(step, HeavisideStep.apply(tau, temperature), may_open)
        optimizer.zero_grad()
        losses.sum().backward()
        gradient = tau.grad.mul_(may_open)
        gradient.mul_((MAX_GRAD_NORM / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1))
        optimizer.step()
        tau.data.clamp_(-1, 1)
    tau.requires_grad_(False)


def can_open(
    tau: Float[Tensor, "setting part"], step: int, steps: int, learning_rate: float
) -> Bool[Tensor, "setting part"]:
    """Parts that are open, or that the steps left could open.

    Adam moves by at most `reach` times the rate (Cauchy-Schwarz on its two moments), and the rate falls to
    zero, so the others are closed for good: leaving them out changes no gate.
    """
    beta1, beta2 = BETAS
    reach = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
    rates = sum(1 - later / steps for later in range(step, steps))
    return tau + max(reach, 1.0) * learning_rate * rates > 0
