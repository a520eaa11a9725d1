"""From a node circuit to the smallest set of nodes and edges: edges are learned, then what is left over goes.

1. Nodes that the calibrated loss can spare are dropped, those of least tau first.
2. Edges between the nodes left are learned as nodes were; the fewest that reach the goal are kept.
3. Edges that can be spared are dropped, and nodes that then lead nowhere.

All on the selection prompts and towards the same goal as the search before, never on held-out prompts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from extractor.circuit import Calibration
from extractor.compact import CompactStudent
from extractor.config import Config
from extractor.edges import EdgeGates
from extractor.masks import HeavisideStep, Means, NodeMasks
from extractor.sites import Node
from extractor.smallest import Sizes, calibrate
from extractor.student import Student
from extractor.tasks import TaskBatch, two_way_loss

BLOCK = 16  # tried at once while dropping


class RefineConfig(Config):
    """How a node circuit is made smaller."""

    enabled: bool = False
    """Circuits get about half the size, in two to ten times the time."""
    steps: int = Field(150, ge=1)
    learning_rate: float = Field(0.03, gt=0)
    edge_coef: float = Field(1e-3, ge=0)
    """Nats of task loss that one edge is worth."""


LossOf = Callable[[Bool[Tensor, " part"]], float]


def drop_spare(
    kept: Bool[Tensor, " part"], order: Int[Tensor, " part"], loss_of: LossOf, goal: float
) -> Bool[Tensor, " part"]:
    """Drop parts, in this order, as long as the loss stays at the goal: block by block, then by halves."""
    kept = kept.clone()

    def attempt(block: list[int]) -> None:
        without = kept.clone()
        without[block] = False
        if loss_of(without) <= goal:
            kept[block] = False
        elif len(block) > 1:
            half = len(block) // 2
            attempt(block[:half])
            attempt(block[half:])

    for block in order[kept[order]].split(BLOCK):
        attempt(block.tolist())
    return kept


def drop_spare_nodes(
    student: Student,
    masks: NodeMasks,
    tau: Float[Tensor, " node"],
    kept: Bool[Tensor, " node"],
    prompts: TaskBatch,
    goal: float,
) -> Bool[Tensor, " node"]:
    sizes = Sizes(student, masks, kept)

    def loss_of(nodes: Tensor) -> float:
        ((loss, _),) = sizes.losses(nodes[None], prompts)
        return loss

    return drop_spare(kept, torch.argsort(tau, stable=True), loss_of, goal)


def find_edges(
    model: CompactStudent,
    means: Means,
    train: TaskBatch,
    wanted: Float[Tensor, " example"],
    selection: TaskBatch,
    goal: float,
    config: RefineConfig,
    pairs_per_step: int,
) -> tuple[list[tuple[Node, Node]], Calibration]:
    """The edges that the task needs among those of a compact model, and the circuit's calibration."""
    gates = EdgeGates(model, means)
    everything = torch.ones(len(gates), dtype=torch.bool, device=model.device)

    @torch.no_grad()
    def measure(kept: Tensor) -> tuple[float, Calibration]:
        logits = gates.logits(kept.float(), selection.ids, selection.last[:, None])
        difference = selection.logit_difference(logits)
        calibration = calibrate(difference)
        return two_way_loss(calibration(difference)).item(), calibration

    loss, calibration = measure(everything)
    if not len(gates) or loss > goal:
        return gates.pairs, calibration
    tau = learn_edges(gates, train, wanted, config, pairs_per_step)
    order = torch.argsort(tau, descending=True, stable=True)
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        kept = torch.zeros_like(everything).index_fill(0, order[:middle], True)
        low, high = (low, middle) if measure(kept)[0] <= goal else (middle, high)
    kept = torch.zeros_like(everything).index_fill(0, order[:high], True)
    kept = drop_spare(kept, order.flip(0), lambda some: measure(some)[0], goal)
    pairs = [pair for pair, is_kept in zip(gates.pairs, kept.tolist(), strict=True) if is_kept]
    return pairs, measure(kept)[1]


def learn_edges(
    gates: EdgeGates,
    train: TaskBatch,
    wanted: Float[Tensor, " example"],
    config: RefineConfig,
    pairs_per_step: int,
) -> Float[Tensor, " edge"]:
    """tau of every edge, by AdamW on task loss + edge_coef * edges open."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(gates), generator=generator).to(wanted.device)
    tau = (0.5 + 0.3 * noise).clamp(-1, 1).requires_grad_()
    optimizer = torch.optim.AdamW([tau], lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    half = len(train) // 2
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / config.steps)
        pairs = torch.randperm(half, generator=generator)[:pairs_per_step].to(wanted.device)
        batch = train.select(pairs)
        open_ = HeavisideStep.apply(tau, 1.0)
        difference = batch.logit_difference(gates.logits(open_, batch.ids, batch.last[:, None]))
        loss = F.binary_cross_entropy_with_logits(difference, wanted[torch.cat([pairs, pairs + half])])
        optimizer.zero_grad()
        (loss + config.edge_coef * open_.sum()).backward()
        torch.nn.utils.clip_grad_norm_([tau], 1.0)
        optimizer.step()
        tau.data.clamp_(-1, 1)
    return tau.detach()


def in_use(
    nodes: frozenset[Node], edges: list[tuple[Node, Node]]
) -> tuple[frozenset[Node], list[tuple[Node, Node]]]:
    """Nodes and edges without those that lead nowhere: reads, values and neurons that no edge leaves."""
    ends = ("attn.q", "attn.k", "attn.resid_delta", "mlp.resid_delta")  # what acts without a weight of ours
    while True:
        leaving = {source for source, _ in edges}
        kept = frozenset(node for node in nodes if node in leaving or node.kind in ends)
        if kept == nodes:
            return nodes, edges
        nodes, edges = kept, [(source, target) for source, target in edges if target in kept]
