"""How close the student is to the dense model, and how well each bridge carries the stream.

All on held-out text, in fp32: losses in nats/token; NMSE as a share of the target's own energy. Position ids
are given where documents are kept apart (`data.separate_documents`).
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.checkpoint import DenseConfig, probe_error
from bridges.dense import DenseModel
from bridges.losses import cross_entropy, kl_divergence, log_probs, mean_square
from bridges.mixture import random_path, run_path
from extractor.sites import Recorder, Site
from extractor.student import Student

EVAL_BATCH = 16


def _batches(blocks: Tensor, position_ids: Tensor | None, device: torch.device) -> Iterator[tuple]:
    chunks = blocks.to(device).split(EVAL_BATCH)
    positions = (
        position_ids.to(device).split(EVAL_BATCH) if position_ids is not None else [None] * len(chunks)
    )
    return zip(chunks, positions, strict=True)


@torch.no_grad()
def compare_on_text(
    dense: DenseModel,
    student: Student,
    blocks: Int[Tensor, "batch seq"],
    position_ids: Int[Tensor, "batch seq"] | None = None,
) -> dict[str, float]:
    """`dense_ce`, `ce` of the student and `kl_dense` = KL(dense || student), nats/token."""
    sums: dict[str, float] = defaultdict(float)
    for ids, at in _batches(blocks, position_ids, dense.device):
        reference = log_probs(dense.run(ids, record=False, position_ids=at).logits)
        own = log_probs(student(ids, position_ids=at).logits)
        sums["dense_ce"] += len(ids) * cross_entropy(reference, ids).item()
        sums["ce"] += len(ids) * cross_entropy(own, ids).item()
        sums["kl_dense"] += len(ids) * kl_divergence(reference, own).item()
    return {key: value / len(blocks) for key, value in sums.items()}


@torch.no_grad()
def evaluate_bridges(
    dense: DenseModel,
    student: Student,
    bridges: BridgeSet,
    blocks: Int[Tensor, "batch seq"],
    position_ids: Int[Tensor, "batch seq"] | None = None,
) -> dict[str, dict[str, float]]:
    """Per site: NMSE both ways, and the KL to the dense model of both single-switch passes."""
    sums: dict[Site, dict[str, float]] = {site: defaultdict(float) for site in bridges.sites}
    for ids, at in _batches(blocks, position_ids, dense.device):
        run = dense.run(ids, position_ids=at)
        reference = log_probs(run.logits)
        recorder = Recorder(*map(str, bridges.sites))
        student(ids, position_ids=at, tap=recorder)
        for site in bridges.sites:
            bridge, row = bridges[site], sums[site]
            dense_resid, sparse_resid = bridges.centred(run.resid[site]), recorder[str(site)]
            encoded, decoded = bridge.encode(dense_resid), bridge.decode(sparse_resid)
            row["sparse_energy"] += mean_square(sparse_resid).item()
            row["dense_energy"] += mean_square(dense_resid).item()
            row["encode_error"] += mean_square(encoded - sparse_resid).item()
            row["decode_error"] += mean_square(decoded - dense_resid).item()
            to_sparse = log_probs(student(ids, position_ids=at, start=site, resid=encoded).logits)
            to_dense = log_probs(dense.run_from(site, decoded, position_ids=at))
            row["kl_dense_to_sparse"] += len(ids) * kl_divergence(reference, to_sparse).item()
            row["kl_sparse_to_dense"] += len(ids) * kl_divergence(reference, to_dense).item()
    return {
        str(site): {
            "nmse_encode": row["encode_error"] / row["sparse_energy"],
            "nmse_decode": row["decode_error"] / row["dense_energy"],
            "kl_dense_to_sparse": row["kl_dense_to_sparse"] / len(blocks),
            "kl_sparse_to_dense": row["kl_sparse_to_dense"] / len(blocks),
        }
        for site, row in sums.items()
    }


@torch.no_grad()
def evaluate_mixtures(
    dense: DenseModel,
    student: Student,
    bridges: BridgeSet,
    blocks: Int[Tensor, "batch seq"],
    position_ids: Int[Tensor, "batch seq"] | None = None,
    *,
    count: int = 64,
    probability: float = 0.5,
    seed: int = 0,
) -> dict[str, object]:
    """KL(dense || mixture) of `count` random paths that switch at several sites, half from each model."""
    paths = [random_path(bridges.sites, probability, i % 2 == 0, [seed, i]) for i in range(count)]
    sums = dict.fromkeys(map(str, paths), 0.0)
    for ids, at in _batches(blocks, position_ids, dense.device):
        run = dense.run(ids, position_ids=at)
        reference = log_probs(run.logits)
        recorder = Recorder(*map(str, bridges.sites))
        student(ids, position_ids=at, tap=recorder)
        for path in {str(path): path for path in paths}.values():
            switch = path.switches[0]
            first = run.resid[switch] if path.starts_dense else recorder[str(switch)]
            own = log_probs(run_path(path, dense, student, bridges, ids, at, first=first))
            sums[str(path)] += len(ids) * kl_divergence(reference, own).item()
    kl = {path: total / len(blocks) for path, total in sums.items()}
    return {
        "switch_probability": probability,
        "paths": kl,
        "kl_mean": sum(kl.values()) / len(kl),
        "kl_max": max(kl.values()),
    }


@torch.no_grad()
def measure_energies_(
    dense: DenseModel,
    student: Student,
    bridges: BridgeSet,
    blocks: Int[Tensor, "batch seq"],
    position_ids: Int[Tensor, "batch seq"] | None = None,
) -> None:
    """Set both streams' mean squares per site from a sample of text (reads, not training)."""
    dense_sum = torch.zeros(len(bridges.sites))
    sparse_sum = torch.zeros(len(bridges.sites))
    chunks = list(_batches(blocks, position_ids, dense.device))
    for ids, at in chunks:
        run = dense.run(ids, position_ids=at)
        recorder = Recorder(*map(str, bridges.sites))
        student(ids, position_ids=at, tap=recorder)
        for index, site in enumerate(bridges.sites):
            dense_sum[index] += mean_square(bridges.centred(run.resid[site])).cpu()
            sparse_sum[index] += mean_square(recorder[str(site)]).cpu()
    bridges.dense_energy.copy_(dense_sum / len(chunks))
    bridges.sparse_energy.copy_(sparse_sum / len(chunks))


def load_plain(config: DenseConfig, dense: DenseModel) -> DenseModel:
    """The model whose weights a student can be copied from: in full precision, adapter merged."""
    if dense.facts["quantization"] == "none" and dense.facts["adapter_mode"] != "live":
        return dense
    return DenseModel.from_pretrained(config, device=dense.device, plain=True)


@torch.no_grad()
def measure_placement(dense: DenseModel, plain: DenseModel, blocks: Tensor) -> dict[str, Any]:
    """How the dense model is held, and how far that is from its full precision on held-out text."""
    kind = {key: dense.facts[key] for key in ("quantization", "adapter", "adapter_mode")}
    if dense is plain:
        return kind | {"probe_kl": 0.0, "probe_max_logit_error": 0.0}
    ids = blocks.to(dense.device)
    error = probe_error(dense.run(ids, record=False).logits, plain.run(ids, record=False).logits)
    return kind | {"probe_kl": error["kl"], "probe_max_logit_error": error["max_logit"]}
