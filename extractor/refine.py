"""From a mask to the smallest set of nodes and edges: what can be spared goes, one greedy pass for each.

1. Of the mask's open nodes, those are dropped that the calibrated loss can spare.
2. Edges between the nodes left are learned as nodes were (`extractor.gates`), then dropped likewise.
3. Nodes that then lead nowhere go.

All on the selection prompts and towards the same goal as the search before, never on held-out prompts. Parts
are tried on some of them; on all, what that misses is put back.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from extractor.adversary import spread
from extractor.circuit import Calibration
from extractor.compact import CompactStudent
from extractor.config import Config
from extractor.edges import EdgeGates
from extractor.gates import learn_gates
from extractor.masks import Bank, Means, NodeMasks, live_channels
from extractor.packed import Chunks, pack
from extractor.restored import RestoredEdges, RestoredSets
from extractor.sites import Node
from extractor.smallest import Sizes, calibrated_losses, gate_gradient
from extractor.student import Student
from extractor.tasks import TaskBatch

FEW = 16  # dropping fewer than a sixteenth at once is slower than to try parts one by one
TRIED_ON = 48  # selection pairs on which parts are tried; what is dropped has to hold on all of them


class RefineConfig(Config):
    """How a node circuit is made smaller."""

    enabled: bool = False
    """Circuits get about half the size."""
    candidates: int = Field(1, ge=1)
    """How many masks are refined, best first; the one with the fewest edges becomes the circuit."""
    steps: int = Field(80, ge=1)
    learning_rate: float = Field(0.03, gt=0)
    edge_coef: float = Field(1e-3, ge=0)
    """Nats of task loss that one edge is worth."""
    put_back_tries: int = Field(400, ge=1)
    """How often it may be asked what was dropped too much; once spent, all that has not been asked stays."""


LossesOf = Callable[[Bool[Tensor, "set part"]], list[float]]
GradientOf = Callable[[Bool[Tensor, " part"]], Float[Tensor, " part"]]
Holds = Callable[[Bool[Tensor, " part"]], bool]


def drop_spare(
    kept: Bool[Tensor, " part"],
    losses_of: LossesOf,
    gradient_of: GradientOf,
    goal: float,
    holds: Holds,
    put_back_tries: int,
    prices: Float[Tensor, " part"] | None = None,
) -> Bool[Tensor, " part"]:
    """Drop parts as long as the loss stays at the goal, and what is asked in the end holds.

    First many at once, those of least first-order effect (minus the slope along their gate); then each that
    the goal can spare, in the order of what the loss is without it. Every part left was needed when its turn
    came. What `holds` then misses is put back: it costs more to ask, and is asked in the same order. Of parts
    that are needed alike, those of a higher price go first.
    """
    prices = torch.ones_like(kept, dtype=torch.float) if prices is None else prices
    first, order = kept, []
    while (count := int(kept.sum())) > 1:
        effect = _per_price(-gradient_of(kept), prices)
        ranked = torch.argsort(effect.masked_fill(~kept, torch.inf), stable=True)
        dropped = ranked[: _longest_prefix(kept, ranked[: count - 1], losses_of, goal)]
        kept = _without(kept, dropped)
        order += dropped.tolist()
        if len(dropped) <= count // FEW:
            break
    candidates = kept.nonzero()[:, 0]
    loss, *others = losses_of(torch.cat([kept[None], _without_each(kept, candidates)]))
    without = torch.tensor(others, device=kept.device)
    effect = _per_price(without - loss, prices[candidates]).masked_fill(without > goal, torch.inf)
    spare = candidates[torch.argsort(effect, stable=True)[: int((without <= goal).sum())]].tolist()
    needed = drop_in_turn(kept, spare, lambda parts: losses_of(parts[None])[0] <= goal)
    order += [part for part in spare if not needed[part]]
    return drop_in_turn(first, order, holds, put_back_tries)


def drop_in_turn(
    kept: Bool[Tensor, " part"], order: Sequence[int], holds: Holds, tries: float = math.inf
) -> Bool[Tensor, " part"]:
    """Without the parts in `order`, but for those without which it does not hold when their turn comes.

    Asks for as many at once as may hold: all, then halves of what failed, twice as many as held before. So a
    part that stays costs about one question where most stay, and the logarithm of their number where few do.
    After so many `tries` the rest of the order stays.
    """
    order, count, failing = list(order), len(order), 0  # the first `failing` cannot all go
    while order and tries > 0:
        if failing == 1:
            order, count, failing = order[1:], 1, 0
            continue
        count = failing // 2 or min(count, len(order))
        tries -= 1
        fewer = _without(kept, torch.tensor(order[:count], device=kept.device))
        if holds(fewer):
            kept, order = fewer, order[count:]
            count, failing = 2 * count, max(0, failing - count)
        else:
            failing = count
    return kept


def _without(kept: Bool[Tensor, " part"], parts: Int[Tensor, " some"]) -> Bool[Tensor, " part"]:
    return kept.index_fill(0, parts, False)


def _per_price(effect: Float[Tensor, " part"], prices: Float[Tensor, " part"]) -> Float[Tensor, " part"]:
    """What a part's leaving does to the loss, by price: of two alike, the dear one comes first."""
    return torch.where(effect > 0, effect / prices, effect * prices)


def _without_each(kept: Tensor, parts: Tensor) -> Bool[Tensor, "set part"]:
    sets = kept.repeat(len(parts), 1)
    sets[torch.arange(len(parts), device=parts.device), parts] = False
    return sets


def _longest_prefix(kept: Tensor, order: Tensor, losses_of: LossesOf, goal: float) -> int:
    """How many of the first parts can go together: the longest that reaches the goal of seven lengths, then
    of the seven between it and the next."""
    low, high = 0, len(order) + 1
    rank = torch.full((len(kept),), len(order), device=kept.device)
    rank[order] = torch.arange(len(order), device=kept.device)
    while high - low > 1:
        count = min(7, high - low - 1)
        lengths = [low + (high - low) * (i + 1) // (count + 1) for i in range(count)]
        sets = kept & (rank >= torch.tensor(lengths, device=kept.device)[:, None])
        for length, loss in zip(reversed(lengths), reversed(losses_of(sets)), strict=True):
            if loss <= goal:
                low = length
                break
            high = length
    return low


def drop_spare_nodes(
    student: Student,
    masks: NodeMasks,
    kept: Bool[Tensor, " part"],
    goal: float,
    prompts: TaskBatch,
    config: RefineConfig,
    bank: Bank | None = None,
    restored: RestoredSets | None = None,
) -> Bool[Tensor, " node"]:
    """The parts that are needed, of those that reach the goal; with `restored`, also while its sets work."""
    sizes = Sizes(student, masks, masks.of_nodes(kept), bank)
    everything, limit = sizes, restored.limit(masks.of_nodes(kept)) if restored else 0.0
    few = spread(prompts, TRIED_ON)

    def losses_of(sets: Tensor) -> list[float]:
        return [loss for loss, _ in sizes.losses(masks.of_nodes(sets), few)]

    def holds(parts: Tensor) -> bool:
        nodes = masks.of_nodes(parts)
        if restored is not None and not restored.holds(nodes, limit):
            return False
        ((loss, _),) = everything.losses(nodes[None], prompts)
        return loss <= goal

    def gradient_of(parts: Tensor) -> Tensor:
        nonlocal sizes
        live = masks.of_nodes(parts)
        if bank is None and int(live.sum()) < 0.8 * sizes.model.num_nodes:
            sizes = Sizes(student, masks, live)
        of_nodes = sizes.gradient(live, few)
        if restored is not None:
            of_nodes = of_nodes + goal / limit * restored.gradient(live)
        return torch.zeros_like(masks.tau[0]).index_add(0, masks.part_of_node, of_nodes)

    prices = torch.zeros_like(masks.tau[0]).index_add(0, masks.part_of_node, masks.prices)
    kept = drop_spare(kept, losses_of, gradient_of, goal, holds, config.put_back_tries, prices)
    return masks.of_nodes(kept)


Draw = Callable[[int, int], tuple[TaskBatch, Float[Tensor, " example"]]]


def find_edges(
    model: CompactStudent,
    means: Means,
    draw: Draw,
    selection: TaskBatch,
    goal: float,
    config: RefineConfig,
    pairs_per_step: int,
    restored: tuple[RestoredSets, Bool[Tensor, " node"]] | None = None,
) -> tuple[list[tuple[Node, Node]], Calibration]:
    """The edges that the task needs among those of a compact model, and the circuit's calibration.

    Args:
        restored: sets of nodes, and the circuit's own: what is needed while those work is kept, too.
    """
    edges = EdgeGates(model, means)
    others = RestoredEdges(*restored, edges.pairs) if restored and len(edges) else None

    few, every = (Chunks(own, model.config) for own in (spread(selection, TRIED_ON), selection))

    def differences(gates: Tensor, prompts: Chunks) -> Float[Tensor, "set example"]:
        return torch.cat([prompts.differences(edges.run(own)) for own in gates])

    @torch.no_grad()
    def losses_of(sets: Tensor) -> list[float]:
        return [loss for loss, _ in calibrated_losses(differences(sets.float(), few))]

    @torch.no_grad()
    def on_all(kept: Tensor) -> tuple[float, Calibration]:
        return calibrated_losses(differences(kept.float()[None], every))[0]

    def holds(kept: Tensor) -> bool:
        return (others is None or others.hold(kept)) and on_all(kept)[0] <= goal

    def gradient_of(kept: Tensor) -> Tensor:
        gates = kept.float()[None].requires_grad_()
        return gate_gradient(gates, differences(gates, few))[0]

    everything = torch.ones(len(edges), dtype=torch.bool, device=model.device)
    loss, calibration = on_all(everything)
    if not len(edges) or loss > goal:
        return edges.pairs, calibration
    tau = learn_edges(edges, draw, config, pairs_per_step, others)
    kept = drop_spare(open_enough(tau, holds), losses_of, gradient_of, goal, holds, config.put_back_tries)
    pairs = [pair for pair, is_kept in zip(edges.pairs, kept.tolist(), strict=True) if is_kept]
    return pairs, on_all(kept)[1]


def open_enough(tau: Float[Tensor, " part"], holds: Holds) -> Bool[Tensor, " part"]:
    """The parts that are open (tau > 0), or as many more in the order of tau as it takes, by doubling."""
    ranked, count = torch.argsort(tau, descending=True, stable=True), max(1, int((tau > 0).sum()))
    while count < len(tau):
        kept = torch.zeros_like(tau, dtype=torch.bool).index_fill(0, ranked[:count], True)
        if holds(kept):
            return kept
        count *= 2
    return torch.ones_like(tau, dtype=torch.bool)


def learn_edges(
    edges: EdgeGates,
    draw: Draw,
    config: RefineConfig,
    pairs_per_step: int,
    restored: RestoredEdges | None = None,
) -> Float[Tensor, " edge"]:
    """tau of every edge, by AdamW on task loss + edge_coef * edges open."""
    noise = torch.randn(len(edges), generator=torch.Generator().manual_seed(0)).to(edges.model.device)
    tau = (0.5 + 0.3 * noise).clamp(-1, 1)[None]

    def objective(step: int, gates: Tensor, may_open: Tensor) -> Float[Tensor, " 1"]:
        batch, wanted = draw(step, pairs_per_step)
        (difference,) = pack(batch, edges.model.config).differences(edges.run(gates[0]))
        loss = F.binary_cross_entropy_with_logits(difference, wanted)
        if restored is not None:
            batch, wanted = draw(step, min(pairs_per_step, restored.sets.config.pairs_per_step))
            difference = restored.difference(gates[0], batch, seed=step)
            loss = (loss + F.binary_cross_entropy_with_logits(difference, wanted)) / 2
        return loss[None] + config.edge_coef * gates.sum(1)

    learn_gates(tau, objective, steps=config.steps, learning_rate=config.learning_rate)
    return tau[0]


def in_use(
    nodes: frozenset[Node], edges: list[tuple[Node, Node]], needed: frozenset[Node] = frozenset()
) -> tuple[frozenset[Node], list[tuple[Node, Node]]]:
    """Nodes and edges without those that lead nowhere: reads, values and neurons that no edge leaves, unless
    they are `needed` all the same."""
    ends = ("attn.q", "attn.k", "attn.resid_delta", "mlp.resid_delta")  # what acts without a weight of ours
    while True:
        leaving = {source for source, _ in edges} | needed
        kept = frozenset(node for node in nodes if node in leaving or node.kind in ends)
        if kept == nodes:
            return nodes, edges
        nodes, edges = kept, [(source, target) for source, target in edges if target in kept]


@torch.no_grad()
def needed_without_edges(
    student: Student,
    nodes: frozenset[Node],
    edges: list[tuple[Node, Node]],
    means: Means,
    prompts: TaskBatch,
    goal: float,
) -> frozenset[Node]:
    """Nodes that no edge leaves and that the task needs: what they write into closed nodes is ranked
    (AbsTopK) or normalised (q/k norms, post-norms) together with open ones."""

    def reaches_goal(some: frozenset[Node]) -> bool:
        model = EdgeGates(CompactStudent(student, live_channels(some), means), means).close_(edges)
        logits = model(prompts.ids, logits_to_keep=prompts.last[:, None]).logits
        return calibrated_losses(prompts.logit_difference(logits)[None])[0][0] <= goal

    used = in_use(nodes, edges)[0]
    if reaches_goal(used):
        return frozenset()
    for node in sorted(nodes - used, key=lambda node: node.sort_key):
        if reaches_goal(nodes - {node}):
            nodes = nodes - {node}
    return nodes - used
