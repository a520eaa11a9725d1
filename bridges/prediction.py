"""Does the student predict the dense model? Effects of the same interventions in both.

Patches of a circuit's reads, or of the best channels of the edit's site where the circuit is empty, at
several strengths; an effect is the mean change of answer minus distractor, the total one, in nats. The
student shows it twice:

    tap     only the sublayer that reads the nodes sees them moved, which is what the circuit says
    stream  everything after sees them moved, as in the dense model, where a crossing changes the stream; with
            an exact copy and an exact bridge this is the effect in the dense model
"""

import random
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from scipy import stats
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.choose import sorted_nodes
from bridges.edit import Edit
from bridges.search import SiteSearch
from bridges.streams import PromptStreams
from extractor.circuit import Circuit
from extractor.config import Config
from extractor.intervention import patch
from extractor.sites import Node, Recorder, Site, Tap, no_tap
from extractor.statistics import CONFIDENCE, ratio_interval, undefined
from extractor.student import Student
from extractor.tasks import TaskBatch

RESAMPLES = 1000
LEAST_SETS = 4  # of nodes, that a correlation's interval is drawn from
LARGEST_SET = 8
RANKED = 32  # channels of a site that stand in for a circuit that reads none


class PredictionConfig(Config):
    """Which interventions are compared; points are (nodes + sets) x strengths."""

    nodes: int = Field(20, ge=0)
    """Single nodes, over all sites."""
    sets: int = Field(12, ge=0)
    """Random sets of 2 to 8 nodes at one site, over all sites."""
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    pairs: int = Field(16, ge=1)
    """Held-out pairs, at most, over which an effect is averaged; they are the same in both models."""


@dataclass(frozen=True)
class Point:
    """One intervention at one strength: mean change of answer minus distractor, total effects, in nats."""

    nodes: tuple[Node, ...]
    site: Site
    strength: float
    tap: float
    """In the student, where only the sublayer that reads the nodes sees them moved."""
    stream: float
    """In the student, where its stream is moved as the dense model's is."""
    measured: float
    """In the dense model."""

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"nodes": list(map(str, self.nodes)), "site": str(self.site)}


def prediction(
    streams: PromptStreams,
    pool: Collection[Node],
    student: Student,
    bridges: BridgeSet,
    config: PredictionConfig,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Does the student predict the dense model: all points, and how they correlate.

    Patches of reads among these nodes (`node_pool`), single ones and random sets, at each strength.
    Intervals draw sets of nodes with replacement, all strengths of one together.
    """
    drawn = draw_nodes(pool, bridges, config, seed)
    if not drawn:
        return undefined("there is no read of a residual channel to move")
    effects = StudentEffects(student, bridges, streams.batch)
    points, cluster = [], []
    for number, (site, nodes) in enumerate(drawn):
        delta = streams.delta(Edit.from_nodes(nodes, site, bridges))
        for strength in config.strengths:
            with torch.no_grad():
                total = streams.differences(site, strength * delta)[0] - streams.unedited
            both = (effect(site, nodes, strength).mean().item() for effect in (effects.tap, effects.stream))
            points.append(Point(tuple(nodes), site, strength, *both, total.mean().item()))
            cluster.append(number)
    return {
        "num_points": len(points),
        "num_prompts": len(streams.batch),
        "tap": compare([(p.tap, p.measured) for p in points], cluster, seed),
        "stream": compare([(p.stream, p.measured) for p in points], cluster, seed),
        "points": [point.as_json() for point in points],
    }


def node_pool(
    edit: Edit, circuit: Circuit, train: PromptStreams, bridges: BridgeSet
) -> tuple[list[Node], str]:
    """What predictions are drawn from, and its name: the circuit's reads.

    Where it has none, the edit's nodes and the other channels of its site that move training answers most,
    by path-integrated attribution.
    """
    addresses = {site.read_address for site in bridges.sites}
    if reads := [node for node in circuit.nodes if node.address in addresses]:
        return reads, "the circuit"
    width = bridges[edit.site].decoder.in_features
    every = [Node(edit.site.read_address, channel) for channel in range(width)]
    ranked = SiteSearch(train, every, edit.site, bridges).along_path
    nodes = list(dict.fromkeys([*edit.nodes, *(every[index] for index in ranked)]))[:RANKED]
    return nodes, f"the {len(nodes)} channels at {edit.site} that move training answers most"


def draw_nodes(
    pool: Collection[Node], bridges: BridgeSet, config: PredictionConfig, seed: int
) -> list[tuple[Site, list[Node]]]:
    """Single reads among these nodes and random sets of them, the sites in turn."""
    rng = random.Random(seed)
    at: dict[Site, list[Node]] = {}
    for site in bridges.sites:
        if nodes := sorted_nodes([node for node in pool if node.address == site.read_address]):
            at[site] = rng.sample(nodes, len(nodes))
    deepest = max(map(len, at.values()), default=0)
    singles = [(site, [nodes[i]]) for i in range(deepest) for site, nodes in at.items() if i < len(nodes)]
    sets: dict[tuple[Site, frozenset[Node]], list[Node]] = {}
    crowded = [site for site, nodes in at.items() if len(nodes) > 1]
    for attempt in range(4 * config.sets if crowded else 0):  # two nodes have one set only
        site = crowded[attempt % len(crowded)]
        chosen = sorted_nodes(rng.sample(at[site], rng.randint(2, min(LARGEST_SET, len(at[site])))))
        if len(sets) < config.sets:
            sets.setdefault((site, frozenset(chosen)), chosen)
    return singles[: config.nodes] + [(site, nodes) for (site, _), nodes in sets.items()]


class StudentEffects:
    """Change of the student's answers under patches of its reads, run from the site on."""

    @torch.no_grad()
    def __init__(self, student: Student, bridges: BridgeSet, batch: TaskBatch):
        self.student, self.batch, self.is_normed = student, batch, bridges.reads_are_normed
        self.recorder = Recorder(*map(str, bridges.sites), *(site.read_address for site in bridges.sites))
        last = batch.last[:, None]
        self.unedited = batch.logit_difference(
            student(batch.ids, tap=self.recorder, logits_to_keep=last).logits
        )

    def tap(self, site: Site, nodes: Sequence[Node], strength: float) -> Float[Tensor, " example"]:
        """The nodes moved where they are read."""
        read = self.recorder[site.read_address]
        counterfactual = {site.read_address: self.batch.counterfactual(read)}
        tap = patch(nodes, strength=strength).tap(last=self.batch.last, counterfactual=counterfactual)
        return self._run(site, self.recorder[str(site)], tap)

    def stream(self, site: Site, nodes: Sequence[Node], strength: float) -> Float[Tensor, " example"]:
        """The same change of the nodes made in the stream, which all later sublayers read."""
        read, resid = self.recorder[site.read_address], self.recorder[str(site)]
        channels = [node.channel for node in nodes]
        change = (self.batch.counterfactual(read) - read)[..., channels]
        scale = resid.square().mean(-1, keepdim=True).sqrt() if self.is_normed else 1.0
        moved = resid.clone()
        moved[..., channels] += strength * change * scale
        return self._run(site, moved, no_tap)

    @torch.no_grad()
    def _run(self, site: Site, resid: Tensor, tap: Tap) -> Float[Tensor, " example"]:
        options = {"start": site, "resid": resid, "logits_to_keep": self.batch.last[:, None]}
        logits = self.student(self.batch.ids, tap=tap, **options).logits
        return self.batch.logit_difference(logits) - self.unedited


def compare(pairs: Sequence[tuple[float, float]], cluster: Sequence[int], seed: int) -> dict[str, Any]:
    """Pearson, Spearman, and the slope through zero of measured on predicted, from (predicted, measured)."""
    predicted, measured = np.array(pairs, dtype=np.float64).T
    if not np.isfinite(pairs).all():
        return undefined("an effect is not finite")
    x, y, group = torch.tensor(predicted), torch.tensor(measured), torch.tensor(cluster)
    return {
        "pearson": correlation_interval(predicted, measured, cluster, seed=seed),
        "spearman": correlation_interval(predicted, measured, cluster, of_ranks=True, seed=seed),
        "slope": ratio_interval(x * y, x * x, group, seed=seed),
    }


def correlation_interval(
    x: Float[np.ndarray, " point"],
    y: Float[np.ndarray, " point"],
    cluster: Sequence[int],
    *,
    of_ranks: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Pearson's r, or Spearman's, with its 95 % interval: BCa bootstrap over clusters, or percentile.

    Returns value, low, high, method, clusters and n, as `extractor.statistics.mean_interval` does.
    """
    names = np.unique(cluster)
    members = [np.flatnonzero(np.asarray(cluster) == name) for name in names]

    def correlation(drawn: np.ndarray) -> float:
        rows = np.concatenate([members[int(index)] for index in drawn])
        columns = [stats.rankdata(values[rows]) if of_ranks else values[rows] for values in (x, y)]
        with np.errstate(all="ignore"):
            return float(np.corrcoef(*columns)[0, 1])

    everything = np.arange(len(names))
    value = correlation(everything)
    if not np.isfinite(value):
        return undefined("one of the two does not vary")
    facts = {"value": value, "clusters": len(names), "n": len(x)}
    if len(names) < LEAST_SETS:
        reason = undefined(f"fewer than {LEAST_SETS} sets of nodes to draw from")
        return facts | {"low": reason, "high": reason, "method": "none"}
    for method in ("BCa", "percentile"):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # all draws alike: BCa is undefined
            found = stats.bootstrap(
                (everything,),
                correlation,
                vectorized=False,
                n_resamples=RESAMPLES,
                confidence_level=CONFIDENCE,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite(found).all():
            return facts | {"low": float(found.low), "high": float(found.high), "method": method}
    reason = undefined("a draw of node sets does not vary")
    return facts | {"low": reason, "high": reason, "method": "none"}
