"""The losses as pure functions: nats per token, and squared errors over a fixed denominator."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def cross_entropy(
    own: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """Mean next-token loss of log-probabilities in nats/token; the last position has no target."""
    return F.nll_loss(own[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def log_probs(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
    return F.log_softmax(logits.float(), dim=-1)


def kl_divergence(
    reference: Float[Tensor, "*batch vocab"], own: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, ""]:
    """Mean KL(reference || own) in nats/token; both hold log-probabilities."""
    return F.kl_div(own.flatten(0, -2), reference.flatten(0, -2), log_target=True, reduction="batchmean")


def normalised_mse(
    predicted: Float[Tensor, "*batch d"], target: Float[Tensor, "*batch d"], energy: Tensor | float
) -> Float[Tensor, ""]:
    """Mean squared error over `energy`, the target's mean square.

    The denominator is a constant of the site, not of the batch: a batch's own would make the
    gradients of two processes differ from those of one.
    """
    return (predicted.float() - target.float()).square().mean() / energy


def mean_square(resid: Float[Tensor, "*batch d"]) -> Float[Tensor, ""]:
    return torch.mean(resid.float().square())
