"""Adversarial masks: the nodes outside a circuit that do it most harm when they come back.

A circuit leaves all other nodes frozen at their means. If it is what the student does the task with, it
should not matter which of them work again: any combination of them may be restored (the rule of parameter
decomposition, where masks are adversarial and shared over the batch). So the worst combination is looked for:
gates of nodes outside the circuit, the same on every prompt, that maximise the circuit's two-way loss.

A node may come back that says nothing about the prompt but shifts all answers alike, which other nodes of the
student make good for. So what is maximised is the loss after the best scale and shift for the set: what it
destroys of the difference between the two sides, at most ln 2. The loss by the circuit's own calibration
stands beside it.

The search is Frank-Wolfe over sets: by the gradient at the gates, averaged over steps, the worst set of
at most n nodes are the n of the largest positive gradients. The worst set met is kept. It runs on selection
prompts; what is reported is measured on held-out ones. It is a search: what it finds is a lower bound.

Weights between the circuit's own nodes that the circuit has closed stay closed.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from extractor.circuit import Calibration, Circuit
from extractor.closed_edges import close_edges
from extractor.config import Config
from extractor.masks import GateTap, Means, NodeMasks, live_channels
from extractor.packed import Chunks, Run
from extractor.sites import Node
from extractor.smallest import calibrate
from extractor.student import Student
from extractor.tasks import TaskBatch, accuracy, two_way_loss

MOMENTUM = 0.6  # of the averaged gradient
NEXT_TO_NONE = 1e-4  # of the largest: rounding alone


class AdversaryConfig(Config):
    """The budget of the search."""

    restored: tuple[int, ...] = Field((1, 10, 100, 0), min_length=1)
    """Most nodes that may be restored, one search each; 0: any number."""
    steps: int = Field(8, ge=1)
    """Gradient steps of every search from every start."""
    starts: int = Field(2, ge=1)
    """Starts of the search for any number: nothing restored, random sets, everything; the others have one."""
    pairs: int = Field(8, ge=1)
    """Selection pairs that the search looks at."""
    random_sets: int = Field(4, ge=1)
    """Random sets of the same size, to compare with."""
    random_pairs: int = Field(16, ge=1)
    """Held-out pairs on which the random sets are measured."""
    seed: int = 0


@dataclass
class Attack:
    """One circuit, with any set of nodes restored."""

    run: Run
    masks: NodeMasks
    inside: Bool[Tensor, " node"]
    calibration: Calibration

    def differences(
        self, restored: Float[Tensor, "set node"], packed: Chunks
    ) -> Float[Tensor, "set example"]:
        """Logit differences of the circuit with each set restored, uncalibrated."""
        gates = torch.where(self.inside, torch.ones_like(restored), restored)
        return packed.differences(self.run, GateTap(self.masks)(gates), times=len(gates))

    def loss(self, difference: Float[Tensor, " example"]) -> Float[Tensor, ""]:
        """Two-way loss at the best scale and shift for these differences (their own gradient is zero there),
        or at the circuit's own, whichever is less."""
        best = calibrate(difference.detach())
        return torch.minimum(two_way_loss(best(difference)), two_way_loss(self.calibration(difference)))

    @torch.no_grad()
    def measure(self, restored: Bool[Tensor, " node"], packed: Chunks) -> dict[str, float]:
        (found,) = self.differences(restored[None].float(), packed)
        return {
            "loss": self.loss(found).item(),
            "accuracy": accuracy(calibrate(found)(found)),
            "loss_by_own_calibration": two_way_loss(self.calibration(found)).item(),
            "accuracy_by_own_calibration": accuracy(self.calibration(found)),
        }


def attack(
    student: Student,
    circuit: Circuit,
    selection: TaskBatch,
    held_out: TaskBatch,
    means: Means,
    config: AdversaryConfig,
) -> dict[str, Any]:
    """The worst sets found, for every bound on their size; losses in nats per two-way choice."""
    student.requires_grad_(False)
    masks = NodeMasks(means, [config.seed])
    inside = node_index(circuit.nodes, means)
    run = close_edges(student, circuit.nodes, circuit.pairs, means)
    target = Attack(run, masks, inside, circuit.calibration)
    searched = spread(selection, config.pairs)
    worst = search(target, Chunks(searched, student.config, rows=4), config)
    generator = torch.Generator().manual_seed(config.seed)
    whole_set = Chunks(held_out, student.config)
    few = Chunks(spread(held_out, config.random_pairs), student.config, rows=4)
    nothing = target.measure(torch.zeros_like(inside), whole_set)
    curve = []
    for most, (chosen, loss) in zip(config.restored, worst, strict=True):
        size = int(chosen.sum())
        curve.append(
            {
                "most": most if most else "any",
                "restored": size,
                "search_loss": loss,
                **target.measure(chosen, whole_set),
                "random_sets": random_sets(target, size, few, config.random_sets, generator),
            }
        )
    everything = Attack(student, masks, inside, Calibration())
    with torch.no_grad():
        (restored,) = everything.differences(torch.ones_like(inside)[None].float(), whole_set)
        gap = (restored - whole_set.differences(student)[0]).abs().max().item()
    return {
        "curve": curve,
        "nothing_restored": nothing,
        "everything_restored": {
            "loss": two_way_loss(restored).item(),
            "accuracy": accuracy(restored),
            "max_difference_from_student": gap,
        },
        "outside": int((~inside).sum()),
        "num_prompts": len(held_out),
        "budget": {
            **config.model_dump(include={"steps", "starts", "random_sets"}),
            "search_prompts": len(searched),
            "random_prompts": len(few.prompts),
        },
    }


def node_index(nodes: Collection[Node], means: Means) -> Bool[Tensor, " node"]:
    """Which of all nodes, in the order of the means, these are."""
    live = live_channels(nodes)
    parts = []
    for address, mean in means.items():
        part = torch.zeros(len(mean), dtype=torch.bool, device=mean.device)
        part[live.get(address, torch.zeros(0, dtype=torch.long))] = True
        parts.append(part)
    return torch.cat(parts)


def search(
    target: Attack, packed: Chunks, config: AdversaryConfig
) -> list[tuple[Bool[Tensor, " node"], float]]:
    """For every bound on the size, the worst set met and its loss on the prompts searched."""
    outside = ~target.inside
    generator = torch.Generator().manual_seed(config.seed)
    count = int(outside.sum())
    bounds, starts = [], []
    for most in config.restored:
        sizes = [0] if most else [count * i // max(1, config.starts - 1) for i in range(config.starts)]
        bounds += [min(most or count, count)] * len(sizes)
        starts += [random_set(outside, size, generator) for size in sizes]
    sets = torch.stack(starts)
    score = torch.zeros(sets.shape, device=sets.device)
    worst, worst_loss = sets.clone(), torch.full((len(sets),), -torch.inf, device=sets.device)
    for step in range(config.steps + 1):
        gates = sets.float().requires_grad_()
        with torch.set_grad_enabled(step < config.steps):
            losses = torch.stack([target.loss(own) for own in target.differences(gates, packed)])
        is_worse = losses.detach() > worst_loss
        worst[is_worse], worst_loss[is_worse] = sets[is_worse], losses.detach()[is_worse]
        if step < config.steps:
            (gradient,) = torch.autograd.grad(losses.sum(), gates)
            gradient = gradient / (gradient.norm(dim=1, keepdim=True) + 1e-12)
            score = MOMENTUM * score + (1 - MOMENTUM) * gradient
            sets = torch.stack([top(own, outside, most) for own, most in zip(score, bounds, strict=True)])
    return [_worst_within(most or count, bounds, worst, worst_loss) for most in config.restored]


def _worst_within(
    most: int, bounds: list[int], worst: Bool[Tensor, "search node"], losses: Float[Tensor, " search"]
) -> tuple[Bool[Tensor, " node"], float]:
    """The worst set found by any search of this bound or a smaller one."""
    allowed = torch.tensor([bound <= most for bound in bounds], device=losses.device)
    best = int(losses.masked_fill(~allowed, -torch.inf).argmax())
    return worst[best], losses[best].item()


def random_set(
    outside: Bool[Tensor, " node"], size: int, generator: torch.Generator
) -> Bool[Tensor, " node"]:
    candidates = outside.nonzero()[:, 0]
    drawn = candidates[torch.randperm(len(candidates), generator=generator)[:size].to(candidates.device)]
    return torch.zeros_like(outside).index_fill(0, drawn, True)


def top(score: Float[Tensor, " node"], outside: Bool[Tensor, " node"], most: int) -> Bool[Tensor, " node"]:
    """The nodes outside of the largest positive score, at most so many, without those of next to none."""
    score = score.masked_fill(~outside, -torch.inf)
    chosen = torch.zeros_like(outside).index_fill(0, score.topk(min(most, len(score))).indices, True)
    return chosen & (score > NEXT_TO_NONE * score.amax().clamp(min=0))


@torch.no_grad()
def random_sets(
    target: Attack, size: int, packed: Chunks, count: int, generator: torch.Generator
) -> dict[str, float]:
    """The circuit's loss with random sets of this size restored."""
    outside = ~target.inside
    sets = torch.stack([random_set(outside, size, generator) for _ in range(count)]).float()
    losses = [target.loss(own).item() for own in target.differences(sets, packed)]
    return {"count": count, "loss_mean": sum(losses) / count, "loss_max": max(losses)}


def spread(prompts: TaskBatch, count: int) -> TaskBatch:
    """So many pairs of a batch, evenly spread over its templates."""
    half = len(prompts) // 2
    by_template = torch.argsort(prompts.cluster[:half], stable=True)
    places = torch.linspace(0, half - 1, min(count, half), device=by_template.device).long()
    return prompts.select(by_template[places].sort().values)
