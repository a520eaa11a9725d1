"""Necessity carried over: the dense model without the image of a circuit.

The image of a circuit at a site is the span of its reads there, decoded: the directions of the dense stream
that they stand for. `removed` sets the stream's part in it to its mean over training text (mean ablation
within a subspace), at all sites of the circuit together and at every position.

Random subspaces to compare with have, at each site, the image's dimension and hold the same share of the
stream's variance on held-out text: a random subspace, tilted towards the large principal components or away
from them until it holds as much. A channel has the same random vector at every site where the circuit reads
it, so they recur over sites as the image does.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from bridges.bridge import BridgeSet
from bridges.crossing import read_directions
from bridges.dense import DenseModel
from bridges.hooks import add_to_input, add_to_output, hooked
from bridges.losses import cross_entropy, log_probs
from bridges.readout import last_differences
from extractor.adversary import spread
from extractor.circuit import Circuit
from extractor.config import Config
from extractor.sites import Site
from extractor.statistics import mean_interval, permutation_p, ratio_interval, undefined
from extractor.tasks import TaskBatch, accuracy

TEXT_BLOCKS = 16  # of a forward
RANK_TOLERANCE = 1e-5  # of the largest singular value: what is less is rounding
VARIANCE_FLOOR = 1e-6  # of the largest variance of a principal component
STEEPEST_TILT = 4.0  # exponent of the variances
SHARE_TOLERANCE = 1e-4  # between the shares of variance of an image and of a random subspace


class ImageConfig(Config):
    """How the image of a circuit is compared with random subspaces."""

    random_subspaces: int = Field(39, ge=0)
    """The least p value that n of them can give is 1/(n + 1)."""
    pairs: int = Field(24, ge=1)
    """Held-out pairs of the circuit's own task."""
    other_pairs: int = Field(8, ge=1)
    """Held-out pairs of every other task."""
    seed: int = 0


@dataclass(frozen=True)
class Image:
    """A subspace of the dense stream at one site, and the stream's mean."""

    basis: Float[Tensor, "dimension d_dense"]  # orthonormal rows
    mean: Float[Tensor, " d_dense"]

    def delta(self, resid: Float[Tensor, "*batch d_dense"]) -> Float[Tensor, "*batch d_dense"]:
        """What moves the stream's part in the subspace to its mean."""
        return -((resid.float() - self.mean) @ self.basis.T) @ self.basis


@dataclass(frozen=True)
class StreamMoments:
    """Of the dense stream at one site, as the dense model reads it (centred where its norms centre)."""

    mean: Float[Tensor, " d_dense"]
    """Over training text."""
    variances: Float[Tensor, " component"]
    """Of the principal components on held-out text, largest first; those without any are left out."""
    components: Float[Tensor, "component d_dense"]

    def share(self, basis: Float[Tensor, "dimension d_dense"]) -> float:
        """Share of the variance on held-out text that a subspace holds."""
        inside = (basis.double() @ self.components.T).square() @ self.variances
        return (inside.sum() / self.variances.sum()).item()


@torch.no_grad()
def stream_moments(
    dense: DenseModel, train_text: Int[Tensor, "block seq"], held_out_text: Int[Tensor, "block seq"]
) -> dict[Site, StreamMoments]:
    """Means over training text, principal components of held-out text, at every site."""
    means, _ = _sums(dense, train_text)
    own_means, squares = _sums(dense, held_out_text)
    found = {}
    for site in dense.sites:
        covariance = squares[site] - own_means[site].outer(own_means[site])
        variances, components = torch.linalg.eigh(covariance)
        some = variances > VARIANCE_FLOOR * variances[-1]
        found[site] = StreamMoments(
            means[site].float(), variances[some].flip(0), components.T[some].flip(0).contiguous()
        )
    return found


def _sums(dense: DenseModel, text: Int[Tensor, "block seq"]) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """Mean and mean outer product of the centred stream, by site."""
    first, second = {}, {}
    for ids in text.to(dense.device).split(TEXT_BLOCKS):
        for site, resid in dense.run(ids).resid.items():
            stream = _centred(resid.double(), dense).flatten(0, 1)
            first[site] = first.get(site, 0) + stream.sum(0) / text.numel()
            second[site] = second.get(site, 0) + stream.T @ stream / text.numel()
    return first, second


def _centred(resid: Tensor, dense: DenseModel) -> Tensor:
    return resid - resid.mean(-1, keepdim=True) if dense.removes_mean else resid


def channels_read(circuit: Circuit, sites: Sequence[Site]) -> dict[Site, list[int]]:
    """Stream channels that the circuit reads, by site; sites without any are left out."""
    found = {
        site: sorted(node.channel for node in circuit.nodes if node.address == site.read_address)
        for site in sites
    }
    return {site: channels for site, channels in found.items() if channels}


def image_of(
    circuit: Circuit, bridges: BridgeSet, moments: Mapping[Site, StreamMoments]
) -> dict[Site, Image]:
    """The circuit's image at every site where it reads channels."""
    return {
        site: Image(span(bridges.centred(read_directions(channels, site, bridges))), moments[site].mean)
        for site, channels in channels_read(circuit, bridges.sites).items()
    }


def span(directions: Float[Tensor, "direction d_dense"]) -> Float[Tensor, "dimension d_dense"]:
    """An orthonormal basis of the directions' span."""
    _, values, rows = torch.linalg.svd(directions.double(), full_matrices=False)
    return rows[values > RANK_TOLERANCE * values[0]].float()


@contextmanager
def removed(dense: DenseModel, images: Mapping[Site, Image]) -> Iterator[PreTrainedModel]:
    """The dense model with its stream's part in the images at its mean, at every position."""
    with ExitStack() as stack:
        for site, image in images.items():
            _hook(stack, dense, site, image)
        yield dense.model


def _hook(stack: ExitStack, dense: DenseModel, site: Site, image: Image) -> None:
    block, deltas = dense.blocks[site.layer], []

    def at_site(resid: Tensor) -> Tensor:
        deltas[:] = [image.delta(resid).to(resid)]
        return deltas[0]

    if site.stream == "resid_pre":
        stack.enter_context(hooked(block.register_forward_pre_hook(add_to_input(at_site))))
        return
    # what reads the stream next sees the delta, and the block passes it on
    reader = block.get_submodule(dense.layout.mid)
    stack.enter_context(hooked(reader.register_forward_pre_hook(add_to_input(at_site))))
    passed_on = add_to_output(lambda output: deltas[0].view_as(output))
    stack.enter_context(hooked(block.register_forward_hook(passed_on)))


def random_image(
    images: Mapping[Site, Image],
    channels: Mapping[Site, Sequence[int]],
    moments: Mapping[Site, StreamMoments],
    generator: torch.Generator,
) -> dict[Site, Image] | None:
    """Random subspaces of the images' dimensions and shares of variance; None where there are none."""
    vectors: dict[int, Tensor] = {}
    found = {}
    for site, image in images.items():
        own, dimension = moments[site], len(image.basis)
        for channel in channels[site]:
            if channel not in vectors:
                vectors[channel] = torch.randn(image.basis.shape[1], generator=generator, dtype=torch.float64)
        drawn = torch.stack([vectors[c] for c in channels[site][:dimension]]).to(own.components)
        basis = _tilted(drawn @ own.components.T, own, own.share(image.basis))
        if basis is None:
            return None
        found[site] = Image(basis.float(), image.mean)
    return found


def _tilted(
    drawn: Float[Tensor, "dimension component"], moments: StreamMoments, share: float
) -> Float[Tensor, "dimension d_dense"] | None:
    """The span of random vectors, their components times a power of the variances, that holds this share.

    The share rises with the exponent, so it is found by bisection.
    """
    if len(drawn) >= len(moments.variances):
        return None
    relative = moments.variances / moments.variances[0]
    low, high = -STEEPEST_TILT, STEEPEST_TILT
    while high - low > 1e-6:
        tilt = (low + high) / 2
        basis = torch.linalg.qr((drawn * relative**tilt).T)[0].T @ moments.components
        gap = moments.share(basis) - share
        if abs(gap) <= SHARE_TOLERANCE:
            return basis
        low, high = (low, tilt) if gap > 0 else (tilt, high)
    return None


@dataclass(frozen=True)
class Without:
    """What the dense model does without some images."""

    own: Float[Tensor, " example"]  # answer minus distractor
    others: Mapping[str, Float[Tensor, " example"]]
    text_loss: float  # nats/token


@torch.no_grad()
def measure_image(
    dense: DenseModel,
    bridges: BridgeSet,
    circuit: Circuit,
    prompts: Mapping[str, TaskBatch],
    moments: Mapping[Site, StreamMoments],
    text: Int[Tensor, "block seq"],
    config: ImageConfig,
) -> dict[str, Any]:
    """What the dense model loses with the circuit's image: its task, other tasks, text.

    Args:
        prompts: held-out prompts of every task, the circuit's own among them.
        text: held-out text for the loss.

    The p values count random subspaces with at most the margin left that the image leaves, and with at
    least its selectivity: the fall of the own task's accuracy less the mean fall of the others'.
    """
    images = image_of(circuit, bridges, moments)
    if not images:
        return undefined("the circuit reads no residual channel at any site")
    channels = channels_read(circuit, bridges.sites)
    prompts = {
        task: spread(batch, config.pairs if task == circuit.task else config.other_pairs)
        for task, batch in prompts.items()
    }

    def without(some: Mapping[Site, Image]) -> Without:
        with removed(dense, some):
            differences = {task: last_differences(dense, batch) for task, batch in prompts.items()}
            own = differences.pop(circuit.task)
            return Without(own, differences, _text_loss(dense, text))

    before, after = without({}), without(images)
    generator = torch.Generator().manual_seed(config.seed)
    controls = []
    while len(controls) < config.random_subspaces:
        drawn = random_image(images, channels, moments, generator)
        if drawn is None:
            break
        controls.append((without(drawn), _overlap(images, drawn)))
    return {
        "sites": {
            str(site): {
                "nodes": len(channels[site]),
                "dimension": len(image.basis),
                "dimensions_in_use": len(moments[site].variances),
                "share_of_variance": moments[site].share(image.basis),
            }
            for site, image in images.items()
        },
        **_own_facts(before, after, prompts[circuit.task], config.seed),
        "others": {
            task: {"accuracy_before": accuracy(before.others[task]), "accuracy": accuracy(difference)}
            for task, difference in after.others.items()
        },
        "selectivity": _selectivity(before, after),
        "text_loss_before": before.text_loss,
        "text_loss": after.text_loss,
        "random_subspaces": _control_facts(before, after, controls)
        if len(controls) == config.random_subspaces
        else undefined("no random subspace of the image's dimension holds its share of the variance"),
        "num_prompts": len(prompts[circuit.task]),
    }


def _own_facts(before: Without, after: Without, batch: TaskBatch, seed: int) -> dict[str, Any]:
    right = (after.own > 0).float()
    return {
        "accuracy_before": accuracy(before.own),
        "accuracy": mean_interval(right, batch.cluster, bounds=(0.0, 1.0), seed=seed),
        "logit_difference_before": before.own.mean().item(),
        "logit_difference": after.own.mean().item(),
        "margin_left": ratio_interval(after.own, before.own, batch.cluster, seed=seed),
    }


def _control_facts(
    before: Without, after: Without, controls: Sequence[tuple[Without, float]]
) -> dict[str, Any]:
    facts: dict[str, Any] = {"count": len(controls)}
    if not controls:
        return facts
    runs = [run for run, _ in controls]
    differences = [run.own.mean().item() for run in runs]
    selectivities = [_selectivity(before, run) for run in runs]
    own = _selectivity(before, after)
    return facts | {
        "accuracy_mean": sum(accuracy(run.own) for run in runs) / len(runs),
        "accuracy_min": min(accuracy(run.own) for run in runs),
        "logit_difference_mean": sum(differences) / len(runs),
        "logit_difference_min": min(differences),
        "p": permutation_p(after.own.mean().item(), differences, "less"),
        "others_accuracy_mean": {
            task: sum(accuracy(run.others[task]) for run in runs) / len(runs) for task in before.others
        },
        "selectivity_p": own
        if isinstance(own, dict)
        else permutation_p(own, [value for value in selectivities if isinstance(value, float)], "greater"),
        "text_loss_mean": sum(run.text_loss for run in runs) / len(runs),
        "overlap_mean": sum(overlap for _, overlap in controls) / len(runs),
    }


def _selectivity(before: Without, after: Without) -> float | dict[str, str]:
    """Fall of the own task's accuracy less the mean fall of the others'."""
    if not before.others:
        return undefined("there is no other task")
    falls = [accuracy(before.others[task]) - accuracy(after.others[task]) for task in before.others]
    return accuracy(before.own) - accuracy(after.own) - sum(falls) / len(falls)


def _overlap(images: Mapping[Site, Image], drawn: Mapping[Site, Image]) -> float:
    """Share of the random subspaces' dimensions that lies in the images."""
    inside = sum((drawn[s].basis @ image.basis.T).square().sum().item() for s, image in images.items())
    return inside / sum(len(image.basis) for image in images.values())


def _text_loss(dense: DenseModel, text: Int[Tensor, "block seq"]) -> float:
    """Nats per token."""
    total = 0.0
    for ids in text.to(dense.device).split(TEXT_BLOCKS):
        own = log_probs(dense.model(ids, use_cache=False).logits)
        total += len(ids) * cross_entropy(own, ids).item()
    return total / len(text)
