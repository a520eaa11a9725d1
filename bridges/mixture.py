"""Passes that switch between the dense model and the student on the way.

A pass begins in one of the two models and crosses a bridge wherever it switches: dense -> encoder -> student
-> decoder -> dense ... Gao et al. 2025, section 2.3, train single switches as a stand-in for all mixtures;
here any mixture runs, for training (`loss.hybrid_sites: multi`) and for evaluation.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.dense import DenseModel
from bridges.hooks import Reached
from extractor.sites import Site
from extractor.student import Student


@dataclass(frozen=True)
class Mixture:
    """Where a pass begins, and the sites at which it changes over, in forward order."""

    starts_dense: bool
    switches: tuple[Site, ...]

    def __str__(self) -> str:
        first = "dense" if self.starts_dense else "sparse"
        return " ".join([first, *map(str, self.switches)])


def random_path(sites: tuple[Site, ...], probability: float, starts_dense: bool, seed: list[int]) -> Mixture:
    """A path that switches at each site with this probability, but at one site at least."""
    random = np.random.default_rng(seed)
    chosen = random.random(len(sites)) < probability
    chosen[random.integers(len(sites))] |= not chosen.any()
    return Mixture(starts_dense, tuple(site for site, switch in zip(sites, chosen, strict=True) if switch))


def run_path(
    path: Mixture,
    dense: DenseModel,
    student: Student,
    bridges: BridgeSet,
    input_ids: Int[Tensor, "batch seq"],
    position_ids: Int[Tensor, "batch seq"] | None = None,
    *,
    first: Float[Tensor, "batch seq d"],
) -> Float[Tensor, "batch seq vocab"]:
    """Logits of the mixture; gradients reach the student and every bridge crossed.

    `first` is the stream at the first switch in the model that the path begins in: whoever calls has run
    both models on these tokens, and need not run them again up to there.
    """
    in_dense, at, resid = path.starts_dense, None, first
    for site in path.switches:
        if at is not None and in_dense:
            resid = dense.run_to(site, input_ids, at, resid, position_ids=position_ids)
        elif at is not None:
            resid = _student_to(site, student, input_ids, at, resid, position_ids)
        bridge = bridges[site]
        resid = bridge.encode(bridges.centred(resid)) if in_dense else bridge.decode(resid)
        in_dense, at = not in_dense, site
    if in_dense:
        return dense.run_from(at, resid, position_ids=position_ids)
    return student(input_ids, start=at, resid=resid, position_ids=position_ids).logits


def _student_to(
    site: Site,
    student: Student,
    input_ids: Tensor,
    start: Site,
    resid: Tensor,
    position_ids: Tensor | None,
) -> Float[Tensor, "batch seq d_sparse"]:
    """The student's stream at a site; later layers do not run."""

    def stop(address: str, activation: Tensor) -> Tensor:
        if address == str(site):
            raise Reached(activation)
        return activation

    try:
        student(input_ids, start=start, resid=resid, position_ids=position_ids, tap=stop)
    except Reached as reached:
        return reached.resid
    raise AssertionError(f"the student has no site {site}")
