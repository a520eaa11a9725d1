"""Which nodes make the smallest edit, at which site and strength.

Site and nodes are chosen on training and selection prompts, by the *indirect* effect: the same delta is taken
out again before the final norm, because a late channel can be nothing but the answer's logit direction.
Everything here is a patch: nodes at one site move to their values on the counterfactual prompt.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bridges.bridge import BridgeSet
from bridges.edit import Edit
from bridges.edit_controls import measure_edit
from bridges.search import EditConfig, SiteSearch, grow
from bridges.steering_gate import KEPT, GateConfig
from bridges.streams import PromptStreams
from extractor.circuit import Circuit
from extractor.errors import UsageError
from extractor.sites import Node, Site
from extractor.statistics import undefined

SLACK = 0.02  # of a flip rate, a prompt or so, for which no nodes are added


@dataclass(frozen=True)
class Growth:
    """The best set found of each size from 1 on, of one site's nodes, at the strength it was found for."""

    site: Site
    strength: float
    sets: tuple[tuple[Node, ...], ...]
    rates: Mapping[float, Sequence[float]]
    """Indirect flip rate on the prompts it was chosen on, by strength; one for each size."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The largest set."""
        return self.sets[-1]

    def smallest(self, strength: float, goal: float, max_size: int | None = None) -> int | None:
        """The least size that reaches the goal; None if none of at most `max_size` does."""
        rates = self.rates[strength][:max_size]
        return next((i + 1 for i, rate in enumerate(rates) if rate >= goal), None)


@dataclass(frozen=True)
class Found:
    """One set of a growth, and the strength that it is for."""

    growth: Growth
    size: int
    strength: float
    reached: bool
    """The goal, on the prompts it was chosen on."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.growth.sets[self.size - 1]

    @property
    def rate(self) -> float:
        return self.growth.rates[self.strength][self.size - 1]

    def edit(self, bridges: BridgeSet) -> Edit:
        return Edit.from_nodes(self.nodes, self.growth.site, bridges)

    def as_json(self) -> dict[str, object]:
        return {
            "site": str(self.growth.site),
            "nodes": [str(node) for node in self.nodes],
            "size": self.size,
            "strength": self.strength,
            "reached": self.reached,
            "flip_rate_chosen_on": self.rate,
        }


def allowed_sites(bridges: BridgeSet, config: EditConfig) -> list[Site]:
    """The sites at which edits are looked for.

    Raises:
        UsageError: a site without a bridge.
    """
    known = {str(site): site for site in bridges.sites}
    if unknown := [name for name in config.sites if name not in known]:
        raise UsageError(f"edit.sites: no bridge at '{unknown[0]}'; there are {', '.join(known)}")
    return [site for name, site in known.items() if not config.sites or name in config.sites]


def grow_edits(
    streams: PromptStreams, circuit: Circuit, bridges: BridgeSet, config: EditConfig
) -> list[Growth]:
    """Sets of nodes for the first strength sought; where those do not reach the goal, for the next, too."""
    growths: list[Growth] = []
    for strength in config.sought:
        growths += _grow_sites(streams, circuit, bridges, strength, config, growths)
        if Limits.of(growths, strength, config).reached:
            break
    return growths


def edits_to_try(growths: Sequence[Growth], config: EditConfig) -> list[Found]:
    """The edits found, the most wanted first.

    First the smallest that reaches the goal at the first strength sought, or what flips most there if that is
    enough; else the same at the next strength; else what flips most. Then all others: by strength, those that
    reach the goal and those that flip enough, the smallest first. Of two alike the later one comes first,
    which says more. None without a node to move.
    """
    if (first := _pick(growths, config)) is None:
        return []
    found = {first.nodes: first}
    for strength in config.sought:
        for rate in (config.goal, config.enough):
            sizes = ((growth, growth.smallest(strength, rate, config.max_size)) for growth in growths)
            known = [Found(growth, size, strength, rate == config.goal) for growth, size in sizes if size]
            for one in sorted(known, key=lambda one: (one.size, -one.growth.site.index)):
                found.setdefault(one.nodes, one)
    return list(found.values())


def _pick(growths: Sequence[Growth], config: EditConfig, *, later: bool = False) -> Found | None:
    """Of all growths, or of those at later sites and up to their own size."""
    found = [at for s in config.sought if (at := _at_strength(growths, s, config, later=later))]
    good = (at for at in found if at.reached or at.rate >= config.enough)
    return next(good, max(found, key=lambda at: at.rate, default=None))


def _at_strength(
    growths: Sequence[Growth], strength: float, config: EditConfig, *, later: bool = False
) -> Found | None:
    """The smallest set that reaches the goal at this strength, else the one that flips most prompts; of a
    site's the largest, or one of fewer nodes if that is enough and flips all but as many."""
    most = config.later_max_size if later else config.max_size
    found = []
    for growth in growths:
        if later and not is_later(growth.site):
            continue
        reached = growth.smallest(strength, config.goal, most)
        alike = max(config.enough, max(growth.rates[strength][:most]) - SLACK)
        size = reached or growth.smallest(strength, alike, most) or min(most, len(growth.sets))
        found.append(Found(growth, size, strength, reached is not None))
    if reached := [one for one in found if one.reached]:
        return min(reached, key=lambda one: (one.size, -one.growth.site.index))
    return max(found, key=lambda one: (one.rate, one.growth.site.index), default=None)


def is_later(site: Site) -> bool:
    """After the first attention: before it an edit is close to swapping a token's embedding."""
    return site.index > 0


@dataclass
class Limits:
    """Most nodes that are worth trying: no more than have reached the goal already."""

    anywhere: int
    later: int
    reached: bool

    @classmethod
    def of(cls, growths: Sequence[Growth], strength: float, config: EditConfig) -> "Limits":
        found = _at_strength(growths, strength, config)
        later = _at_strength(growths, strength, config, later=True) if config.later_max_size else None
        sizes = [
            one.size if one is not None and one.reached else most
            for one, most in ((found, config.max_size), (later, config.later_max_size))
        ]
        wanted = [found, later] if config.later_max_size else [found]
        return cls(*sizes, all(one is not None and one.reached for one in wanted))

    def at(self, site: Site) -> int:
        return max(self.anywhere, self.later) if is_later(site) else self.anywhere


def _grow_sites(
    streams: PromptStreams,
    circuit: Circuit,
    bridges: BridgeSet,
    strength: float,
    config: EditConfig,
    growths: Sequence[Growth],
) -> list[Growth]:
    """At the sites where the nodes that matter most flip the answers furthest; `growths` are those there are
    of other strengths."""
    searches: list[SiteSearch] = []
    for site in allowed_sites(bridges, config):
        if nodes := _movable(site, circuit, bridges, config):
            search = SiteSearch(streams, nodes, site, bridges, strength, config.attribution_points)
            searches = _most_promising([*searches, search], config)
    grown: list[Growth] = []
    for search in searches:
        limit = Limits.of([*growths, *grown], strength, config).at(search.site)
        grown.append(_growth(search, grow(search, limit, config), config))
    return grown


def _most_promising(searches: Sequence[SiteSearch], config: EditConfig) -> list[SiteSearch]:
    """As many as are tried, and a later site among them where an edit of one is wanted."""
    by_loss = sorted(searches, key=lambda one: one.measure(one.along_path[: config.max_size]).loss)
    chosen = by_loss[: config.sites_tried]
    if config.later_max_size and not any(is_later(search.site) for search in chosen):
        chosen += [search for search in by_loss if is_later(search.site)][:1]
    return chosen


def _movable(site: Site, circuit: Circuit, bridges: BridgeSet, config: EditConfig) -> list[Node]:
    if config.nodes == "student":
        width = bridges[site].decoder.in_features
        return [Node(site.read_address, channel) for channel in range(width)]
    return sorted_nodes([node for node in circuit.nodes if node.address == site.read_address])


@torch.no_grad()
def _growth(search: SiteSearch, sets: Sequence[Sequence[int]], config: EditConfig) -> Growth:
    def rate(chosen: Sequence[int], strength: float) -> float:
        if strength == search.strength:
            return search.measure(chosen).rate
        delta = strength / search.strength * search.delta(chosen)
        return search.streams.flip_rate(search.streams.differences(search.site, delta)[1])

    rates = {s: [rate(chosen, s) for chosen in sets] for s in config.sought}
    nodes = tuple(tuple(search.nodes[index] for index in chosen) for chosen in sets)
    return Growth(search.site, search.strength, nodes, rates)


def unmet_in_training(
    kl: float, push: float, flips: float, config: EditConfig, gate: GateConfig
) -> tuple[float, float, bool]:
    """What speaks against an edit, the worst first; nothing where all three are 0.

    Args:
        kl: of its steering form on training text, nats/token: how many whole times that takes up its budget
            again counts, as limits on held-out text are wider.
        push: indirect flip rate of random directions of its size; it counts where it is above the limit.
        flips: indirect flip rate of the steering form; one that is all but shut costs no KL.
    """
    exceeded = max(0, math.ceil(kl / gate.kl_budget) - 1) if math.isfinite(kl) else math.inf
    return exceeded, push if push > config.control_limit else 0.0, flips < KEPT * gate.goal


@torch.no_grad()
def _indirect(streams: PromptStreams, edit: Edit, strengths: Sequence[float]) -> dict[float, float]:
    """Indirect flip rate on the prompts at every strength."""
    delta = streams.delta(edit)
    return {s: streams.flip_rate(streams.differences(edit.site, s * delta)[1]) for s in strengths}


@torch.no_grad()
def growth_facts(
    growths: Sequence[Growth],
    streams: PromptStreams,
    circuit: Circuit,
    bridges: BridgeSet,
    config: EditConfig,
) -> dict[str, object]:
    """What every size does on these (held-out) prompts, and what all channels of every site do together.

    `smallest` are the least sizes that reach the goal where they were chosen, by strength; `best` the same,
    or what flips most where nothing reaches it.
    """
    everything = {
        site: _everything(streams, site, bridges, config) for site in allowed_sites(bridges, config)
    }
    rows = []
    for growth in growths:
        edits = [Edit.from_nodes(nodes, growth.site, bridges) for nodes in growth.sets]
        rates = [_indirect(streams, edit, [growth.strength])[growth.strength] for edit in edits]
        row = {
            "site": str(growth.site),
            "strength": growth.strength,
            "nodes": [str(node) for node in growth.nodes],
            "sets": [[str(node) for node in nodes] for nodes in growth.sets],
            "circuit": [str(node) for node in growth.nodes if node in circuit.nodes],
            "everything": everything[growth.site],
            "flip_rate_indirect": {f"{growth.strength:g}": rates},
        }
        rows.append(row)
    smallest, best = {}, {}
    for found in (at for s in config.sought if (at := _at_strength(growths, s, config))):
        rates = _indirect(streams, found.edit(bridges), config.sought)
        name = f"{found.strength:g}"
        smallest[name] = _smallest(
            found, rates[found.strength], everything[found.growth.site], circuit, config
        )
        best[name] = found.as_json() | {"flip_rate_indirect": {f"{s:g}": rate for s, rate in rates.items()}}
    all_channels = {str(site): rate for site, rate in everything.items()}
    return {"growth": rows, "smallest": smallest, "best": best, "all_channels": all_channels}


def _smallest(
    found: Found, rate: float, everything: float, circuit: Circuit, config: EditConfig
) -> dict[str, object]:
    if not found.reached:
        reason = f"no edit of at most {config.max_size} nodes flips {config.goal:.0%} where it was chosen"
        return undefined(reason)
    is_in = [node in circuit.nodes for node in found.nodes]
    inside = sum(is_in) if circuit.nodes else undefined("no circuit of this task was found")
    share = rate / everything if everything else undefined("all channels together flip nothing")
    return {
        "size": found.size,
        "site": str(found.growth.site),
        "in_circuit": inside,
        "flip_rate_indirect": rate,
        "share_of_everything": share,
    }


def _everything(streams: PromptStreams, site: Site, bridges: BridgeSet, config: EditConfig) -> float:
    """Flip rate of all channels that the student reads at the site, moved to the first strength sought."""
    width = bridges[site].decoder.in_features
    edit = Edit.from_nodes([Node(site.read_address, channel) for channel in range(width)], site, bridges)
    return _indirect(streams, edit, config.sought[:1])[config.sought[0]]


def later_facts(
    growths: Sequence[Growth], streams: PromptStreams, bridges: BridgeSet, config: EditConfig, seed: int
) -> dict[str, object]:
    """The smallest edit after the first attention on these (held-out) prompts, at the strength it is for."""
    found = _pick(growths, config, later=True)
    if found is None:
        return undefined("no site after the first attention has a node to move")
    at_once = config.model_copy(update={"strengths": (found.strength,)})
    measured = measure_edit(streams, found.edit(bridges), bridges, at_once, seed)
    del measured["strengths"]
    return found.as_json() | {k: v[0] if isinstance(v, list) else v for k, v in measured.items()}


def sorted_nodes(nodes: Sequence[Node]) -> list[Node]:
    return sorted(nodes, key=lambda node: node.sort_key)
