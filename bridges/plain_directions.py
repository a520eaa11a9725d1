"""Plain directions of the dense stream that move a task's answers, from training prompts alone.

All point from the prompts that are edited towards the other answer. They are what an edit through the bridge
has to be compared with, and none needs the student.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridges.flip_curves import inside, select_prompts
from bridges.hooks import hooked
from bridges.readout import ridge_logistic
from bridges.steering import Direction, class_means, half, told_apart
from bridges.tails import PromptTails
from extractor.sites import Site


def difference_of_means(tails: PromptTails, site: Site, direction: Direction) -> Float[Tensor, " d_dense"]:
    """From the edited prompts to the others."""
    edited, other = class_means(tails.batch, tails.resid[site].float(), direction)
    return other - edited


def probe_direction(
    tails: PromptTails, site: Site, direction: Direction, l2: float
) -> Float[Tensor, " d_dense"]:
    """Against a regularised logistic regression's weights for "is an edited prompt".

    Of the stream as the dense model reads it, centred and scaled to a mean square norm of 1.
    """
    resid = tails.resid[site].float()
    if tails.dense.removes_mean:
        resid = resid - resid.mean(-1, keepdim=True)
    features = torch.einsum("es,esd->ed", told_apart(tails.batch, resid), resid).double()
    features = features - features.mean(0)
    features = features / features.square().sum(1).mean().sqrt()
    weights = ridge_logistic(features, half(tails.batch, direction), l2 * len(features))
    return -weights.float()


def best_channel(
    tails: PromptTails, site: Site, direction: Direction, norm: float, tried: int
) -> Float[Tensor, " d_dense"]:
    """The channel and sign that, moved by `norm` from where prompts part, lower the right answers most.

    By the indirect effect, among the channels of the largest gradient and those that differ most.
    """
    part = select_prompts(tails, half(tails.batch, direction), [site])
    column = torch.arange(part.batch.ids.shape[1], device=part.start.device)
    late = (column >= part.start[:, None])[..., None] & inside(part.batch)
    with torch.enable_grad():
        delta = torch.zeros_like(part.resid[site]).requires_grad_()
        (gradient,) = torch.autograd.grad(part.differences(site, delta)[1].sum(), delta)
    slope = -(gradient * late).sum((0, 1))
    means = difference_of_means(tails, site, direction)  # finds those whose gradient vanishes, too
    candidates = {
        (channel, float(likely[channel].sign()))
        for likely in (slope, means)
        for channel in likely.abs().topk(min(-(-tried // 2), len(slope))).indices.tolist()
    }

    def answered_right(candidate: tuple[int, float]) -> float:
        vector = _one_channel(slope, candidate, norm)
        with torch.no_grad():
            return part.differences(site, vector * late)[1].sigmoid().mean().item()

    return _one_channel(slope, min(sorted(candidates), key=answered_right), norm)


def _one_channel(like: Tensor, candidate: tuple[int, float], norm: float) -> Float[Tensor, " d_dense"]:
    channel, sign = candidate
    vector = torch.zeros_like(like)
    vector[channel] = sign * norm
    return vector


def unembedding_difference(tails: PromptTails, direction: Direction) -> Float[Tensor, " d_dense"]:
    """Mean gradient of distractor minus answer by the stream before the final norm, at the last position.

    Over the edited half of the training prompts, each with its own answers.
    """
    dense, batch = tails.dense, tails.batch
    stream: list[Tensor] = []

    def keep(module: nn.Module, args: tuple) -> None:
        stream.append(args[0].detach())

    last_site = dense.sites[-1]
    with torch.no_grad(), hooked(dense.final_norm.register_forward_pre_hook(keep)):
        dense.run_from(last_site, tails.resid[last_site])
    rows = half(batch, direction).nonzero()[:, 0]
    read = stream[0].view(*batch.ids.shape, -1)[rows, batch.last[rows]]
    with torch.enable_grad():
        read.requires_grad_()
        logits = tails.head(dense.final_norm(read))
        chosen = [logits.gather(1, ids[rows, None]) for ids in (batch.distractor, batch.answer)]
        (gradient,) = torch.autograd.grad((chosen[0] - chosen[1]).sum(), read)
    return gradient.float().mean(0)
