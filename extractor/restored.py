"""Circuits that hold while others work: closed nodes restored at random, while a circuit is looked for.

A mask learned against frozen nodes alone may lean on what they are frozen at: it does its task there, and no
longer when some of the rest works again, which `extractor.adversary` tests on held-out prompts. So closed
nodes are restored at random in the search, too. (Stochastic masks between a circuit and the whole network,
as in parameter decomposition, Bushnaq et al. 2025.)
"""

import functools
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from extractor.adversary import Attack, random_set, spread
from extractor.circuit import Calibration
from extractor.closed_edges import Pairs, StudentEdges
from extractor.compact import CompactStudent
from extractor.config import Config
from extractor.masks import GateTap, NodeMasks
from extractor.packed import Chunks, pack
from extractor.smallest import calibrated_losses, gate_gradient
from extractor.student import Student
from extractor.tasks import TaskBatch, two_way_loss

Fold = Callable[[Mapping[str, Tensor]], CompactStudent]  # of the channels kept
SHARES = (0.1, 0.3, 0.45, 0.6)  # of all nodes


class RestoredConfig(Config):
    """What a circuit should not mind."""

    enabled: bool = False
    """Circuits get larger, and the search takes longer: the whole student runs, nothing is folded away."""
    pairs_per_step: int = Field(4, ge=1)
    """Of a step's pairs, how many are run once more, each with a random set of closed nodes restored."""
    max_loss: float = Field(0.2, gt=0)
    """Two-way loss in nats that no random set may exceed, on selection prompts, for a node to be spared."""
    sets: int = Field(1, ge=1)
    """Random sets of every size on which that is tried."""
    pairs: int = Field(8, ge=2)
    """Selection pairs on which that is tried."""


def restore_at_random(gates: Float[Tensor, "setting node"], pairs: int, seed: int) -> Tensor:
    """Gates of every setting's pairs, (setting * pairs, node): each with random closed nodes restored.

    How many is random, too: any share of them is as likely as any other.
    """
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(len(gates), pairs, 1, generator=generator)
    works = torch.rand(len(gates), pairs, gates.shape[1], generator=generator) < share
    return torch.where(works.to(gates.device), 1.0, gates[:, None]).flatten(0, 1)


class RestoredSets:
    """A few fixed random sets of nodes, and what their work does to circuits."""

    def __init__(
        self, student: Student, masks: NodeMasks, prompts: TaskBatch, config: RestoredConfig, seed: int = 0
    ):
        self.student, self.masks, self.config = student, masks, config
        self.prompts = Chunks(spread(prompts, config.pairs), student.config)
        everything = torch.ones_like(masks.part_of_node, dtype=torch.bool)
        generator = torch.Generator().manual_seed(seed)
        sizes = [max(1, round(share * len(everything))) for share in SHARES for _ in range(config.sets)]
        self.sets = torch.stack([random_set(everything, size, generator) for size in sizes])
        self._failed = 0

    def limit(self, kept: Bool[Tensor, " node"], fold: Fold | None = None) -> float:
        """What a smaller circuit than this may reach: `max_loss`, or what this one itself does."""
        return max(self.config.max_loss, self.loss(kept, fold))

    def loss(self, kept: Bool[Tensor, " node"], fold: Fold | None = None) -> float:
        """The circuit's largest two-way loss with one of the sets restored, at the best scale and shift.

        Args:
            fold: makes the compact student of these channels; of the student as it is, unless given.
        """
        return max(self._loss(kept, number, fold) for number in range(len(self.sets)))

    def holds(self, kept: Bool[Tensor, " node"], limit: float, fold: Fold | None = None) -> bool:
        """No set's loss is above the limit. The set that failed last is tried first."""
        for number in sorted(range(len(self.sets)), key=lambda own: own != self._failed):
            if self._loss(kept, number, fold) > limit:
                self._failed = number
                return False
        return True

    @torch.no_grad()
    def _loss(self, kept: Bool[Tensor, " node"], number: int, fold: Fold | None) -> float:
        live = self.masks.live(kept | self.sets[number])
        model = CompactStudent(self.student, live, self.masks.means) if fold is None else fold(live)
        (found,) = self.prompts.differences(model)
        ((loss, _),) = calibrated_losses(found[None])
        return min(loss, two_way_loss(found).item())

    def gradient(self, kept: Bool[Tensor, " node"]) -> Float[Tensor, " node"]:
        """Slope of the sets' summed losses along the nodes' gates; zero where a set holds the node."""
        gates = kept.float().requires_grad_()
        restored = torch.where(self.sets, 1.0, gates)
        target = Attack(self.student, self.masks, torch.zeros_like(kept), Calibration())
        found = target.differences(restored, self.prompts)
        return gate_gradient(gates, found)


class RestoredEdges:
    """A circuit's edges on the whole student, while nodes outside the circuit work."""

    def __init__(self, sets: RestoredSets, kept: Bool[Tensor, " node"], pairs: Pairs):
        """
        Args:
            kept: the circuit's nodes.
            pairs: source and target of every edge that may be open.
        """
        self.sets, self.kept = sets, kept
        nodes = sets.masks.nodes(kept)
        self.edges = StudentEdges(sets.student, nodes, pairs, sets.masks.means)
        self.loss = sets.loss(kept, self._folded(torch.ones(len(pairs), device=kept.device)))
        self.limit = max(sets.config.max_loss, self.loss)

    def hold(self, gates: Bool[Tensor, " edge"]) -> bool:
        """No set, restored, brings the loss above the limit."""
        return self.sets.holds(self.kept, self.limit, self._folded(gates.float()))

    def _folded(self, gates: Float[Tensor, " edge"]) -> Fold:
        return functools.partial(self.edges.compact, gates)

    def difference(
        self, gates: Float[Tensor, " edge"], prompts: TaskBatch, seed: int
    ) -> Float[Tensor, " example"]:
        """Logit differences, with other random nodes restored for every pair."""
        nodes = restore_at_random(self.kept.float()[None], len(prompts) // 2, seed)
        packed = pack(prompts, self.sets.student.config)
        return packed.differences(self.edges.run(gates), GateTap(self.sets.masks)(nodes))[0]
