"""The search for few nodes of one site that flip the answers together.

A set of nodes is grown one by one. What a node would do is first judged by the gradient at the set at hand,
because an answer is flipped from where the set has moved it, not from where nothing or everything moves; the
most promising are then measured exactly. Nodes that do nothing alone stand out only where others move, too:
those that matter on the way to all of them moved are measured as well. At the end nodes are dropped, and
exchanged one for one, while that helps.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.crossing import read_directions
from bridges.streams import PromptStreams
from extractor.config import Config
from extractor.sites import Node, Site

NEWS = 1e-4  # nats by which an exchange must lower the objective


class EditConfig(Config):
    """How an edit is chosen and measured."""

    nodes: Literal["circuit", "student"] = "circuit"
    """What an edit may move: the circuit's nodes, or any channel that the student reads at the site."""
    sites: tuple[str, ...] = ()
    """Sites at which edits are looked for, as "1.resid_mid"; empty: all that have a bridge."""
    max_size: int = Field(8, ge=1)
    """Most nodes of an edit."""
    later_max_size: int = Field(0, ge=0)
    """Also look for the smallest edit after the first attention, of so many nodes at most; 0: do not."""
    candidates: int = Field(4, ge=1)
    """Nodes that are measured before one is added, the most promising first."""
    swapped: int = Field(1, ge=0)
    """Nodes of a finished set, the least needed first, for which others are tried; 0: none."""
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0)
    """Strengths measured on held-out prompts; 1 is the counterfactual's own value."""
    sought: tuple[float, ...] = Field((1.0, 2.0), min_length=1)
    """Strengths for which the smallest edit is looked for, the most wanted first."""
    goal: float = Field(0.9, gt=0, le=1)
    """Indirect flip rate, on the prompts it is chosen on, that makes an edit large enough."""
    enough: float = Field(0.85, gt=0, le=1)
    """The same rate, with which an edit is taken before one of a strength that is wanted less: what flips so
    many where it was chosen flips about 80 % of held-out prompts."""
    sites_tried: int = Field(2, ge=1)
    """Sites at which nodes are searched for, most promising first."""
    control_draws: int = Field(8, ge=1)
    """Random node sets and random directions, whose flip rates are averaged."""
    control_limit: float = Field(0.05, ge=0, le=1)
    """Of edits that flip enough one is preferred of whose size random directions flip at most so many of the
    training prompts: half of the 10 % that are allowed on held-out ones."""
    attribution_points: int = Field(3, ge=1)
    """Steps of the path integral that ranks nodes; odd, so that one is half way, where answers tip."""


@dataclass(frozen=True)
class Outcome:
    """What a set of nodes does by its indirect effect."""

    loss: float
    """Mean softplus of answer minus distractor, in nats, over the prompts answered right without it."""
    rate: float
    """Share of those that flip."""


class SiteSearch:
    """A site's nodes, moved together to a strength on a batch of prompts; sets are indices into `nodes`."""

    def __init__(
        self,
        streams: PromptStreams,
        nodes: Sequence[Node],
        site: Site,
        bridges: BridgeSet,
        strength: float = 1.0,
        points: int = 3,
    ):
        self.streams, self.nodes, self.site, self.strength = streams, tuple(nodes), site, strength
        self.points = points  # of the path integral
        channels = [node.channel for node in nodes]
        presented = streams.presented[site.read_address]
        change = (streams.batch.counterfactual(presented) - presented)[..., channels]
        self.change: Float[Tensor, "example seq node"] = strength * change * streams.dense_rms[site]
        self.directions: Float[Tensor, "node d_dense"] = read_directions(channels, site, bridges)
        right = streams.unedited > 0
        self.counted = right if right.any() else torch.ones_like(right)
        self._outcomes: dict[frozenset[int], Outcome] = {}

    def delta(self, chosen: Sequence[int]) -> Float[Tensor, "example seq d_dense"]:
        """What the set adds to the dense stream at the search's strength."""
        index = torch.tensor(chosen, dtype=torch.long, device=self.change.device)
        return self.change[..., index] @ self.directions[index]

    @torch.no_grad()
    def measure(self, chosen: Sequence[int]) -> Outcome:
        key = frozenset(chosen)
        if key not in self._outcomes:
            difference = self.streams.differences(self.site, self.delta(sorted(key)))[1]
            rate = self.streams.flip_rate(difference)
            self._outcomes[key] = Outcome(self._objective(difference).item(), rate)
        return self._outcomes[key]

    def best(self, sets: Iterable[list[int]]) -> list[int]:
        """The set of the least loss; the first of those that are alike."""
        return min(sets, key=lambda chosen: self.measure(chosen).loss)

    def promising(self, chosen: Sequence[int], count: int) -> list[int]:
        """So many nodes to add: by their effect beside the set and by that along the path to all, in turn."""
        left = [index for index in range(len(self.nodes)) if index not in chosen]
        if len(left) <= count:
            return left
        here = torch.argsort(self._effects(self.delta(chosen)), stable=True).tolist()
        in_turn = dict.fromkeys(chain.from_iterable(zip(here, self.along_path, strict=True)))
        return [index for index in in_turn if index not in chosen][:count]

    @cached_property
    def along_path(self) -> list[int]:
        """All nodes by their share of the effect of all of them, integrated from none moved to all moved."""
        full = self.delta(range(len(self.nodes)))
        shares = [(point + 0.5) / self.points for point in range(self.points)]
        effects = torch.stack([self._effects(share * full) for share in shares]).sum(0)
        return torch.argsort(effects, stable=True).tolist()

    def _objective(self, difference: Float[Tensor, " example"]) -> Float[Tensor, ""]:
        # it is linear where much is left to do, and what has flipped counts no more
        return F.softplus(difference[self.counted]).mean()

    @torch.enable_grad()
    def _effects(self, delta: Float[Tensor, "example seq d_dense"]) -> Float[Tensor, " node"]:
        """First-order change of the objective if each node moved, beside what `delta` moves."""
        delta = delta.detach().requires_grad_()
        loss = self._objective(self.streams.differences(self.site, delta)[1])
        (gradient,) = torch.autograd.grad(loss, delta)
        return ((gradient @ self.directions.T) * self.change).sum((0, 1))


def grow(search: SiteSearch, max_size: int, config: EditConfig) -> list[list[int]]:
    """The best set found of each size from 1 on, up to the first that reaches the goal, or `max_size`.

    Of each size the first nodes along the path are a set, too: of those that act together only, none is
    worth adding first.
    """
    sets: list[list[int]] = []
    chosen: list[int] = []
    while len(chosen) < min(max_size, len(search.nodes)):
        grown = [[*chosen, index] for index in search.promising(chosen, config.candidates)]
        chosen = search.best([*grown, search.along_path[: len(chosen) + 1]])
        sets.append(chosen)
        if search.measure(chosen).rate >= config.goal:
            break
    return refine(search, sets, config)


def refine(search: SiteSearch, sets: list[list[int]], config: EditConfig) -> list[list[int]]:
    """The same with the largest set exchanged towards the goal; then smaller ones, while they reach it."""
    chosen = swap(search, sets[-1], config)
    sets = [*sets[:-1], chosen]
    while len(chosen) > 1 and search.measure(chosen).rate >= config.goal:
        fewer = search.best(without(chosen))
        fewer = swap(search, search.best([fewer, sets[len(chosen) - 2]]), config)
        sets = [*sets[: len(fewer) - 1], fewer, *sets[len(fewer) :]]
        if search.measure(fewer).rate >= config.goal:
            sets = sets[: len(fewer)]
        chosen = fewer
    return sets


def swap(search: SiteSearch, chosen: list[int], config: EditConfig) -> list[int]:
    """Exchange nodes one for one while that lowers the loss, until the goal is reached."""
    while search.measure(chosen).rate < config.goal:
        least_needed = sorted(without(chosen), key=lambda rest: search.measure(rest).loss)[: config.swapped]
        tried = []
        for rest in least_needed:
            others = [i for i in search.promising(rest, config.candidates + 1) if i not in chosen]
            tried += [[*rest, index] for index in others[: config.candidates]]
        if not tried:
            break
        best = search.best(tried)
        if search.measure(best).loss > search.measure(chosen).loss - NEWS:
            break
        chosen = best
    return chosen


def without(chosen: Sequence[int]) -> list[list[int]]:
    """The sets with one node less."""
    return [[index for index in chosen if index != left_out] for left_out in chosen]
