"""How close the student is to the dense model, and how well each bridge carries the stream.

All on held-out text, in fp32: losses in nats/token; NMSE as a share of the target's own energy.
"""

from collections import defaultdict

import torch
from jaxtyping import Int
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.dense import DenseModel
from bridges.losses import cross_entropy, kl_divergence, log_probs, mean_square
from extractor.sites import Recorder, Site
from extractor.student import Student

EVAL_BATCH = 16


@torch.no_grad()
def compare_on_text(
    dense: DenseModel, student: Student, blocks: Int[Tensor, "batch seq"]
) -> dict[str, float]:
    """`dense_ce`, `ce` of the student and `kl_dense` = KL(dense || student), nats/token."""
    sums: dict[str, float] = defaultdict(float)
    for ids in blocks.to(dense.device).split(EVAL_BATCH):
        reference = log_probs(dense.run(ids, record=False).logits)
        own = log_probs(student(ids).logits)
        sums["dense_ce"] += len(ids) * cross_entropy(reference, ids).item()
        sums["ce"] += len(ids) * cross_entropy(own, ids).item()
        sums["kl_dense"] += len(ids) * kl_divergence(reference, own).item()
    return {key: value / len(blocks) for key, value in sums.items()}


@torch.no_grad()
def evaluate_bridges(
    dense: DenseModel, student: Student, bridges: BridgeSet, blocks: Int[Tensor, "batch seq"]
) -> dict[str, dict[str, float]]:
    """Per site: NMSE both ways, and the KL to the dense model of both single-switch passes."""
    sums: dict[Site, dict[str, float]] = {site: defaultdict(float) for site in bridges.sites}
    for ids in blocks.to(dense.device).split(EVAL_BATCH):
        run = dense.run(ids)
        reference = log_probs(run.logits)
        recorder = Recorder(*map(str, bridges.sites))
        student(ids, tap=recorder)
        for site in bridges.sites:
            bridge, row = bridges[site], sums[site]
            dense_resid, sparse_resid = bridges.centred(run.resid[site]), recorder[str(site)]
            encoded, decoded = bridge.encode(dense_resid), bridge.decode(sparse_resid)
            row["sparse_energy"] += mean_square(sparse_resid).item()
            row["dense_energy"] += mean_square(dense_resid).item()
            row["encode_error"] += mean_square(encoded - sparse_resid).item()
            row["decode_error"] += mean_square(decoded - dense_resid).item()
            to_sparse = log_probs(student(ids, start=site, resid=encoded).logits)
            to_dense = log_probs(dense.run_from(site, decoded))
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
def measure_energies_(
    dense: DenseModel, student: Student, bridges: BridgeSet, blocks: Int[Tensor, "batch seq"]
) -> None:
    """Set both streams' mean squares per site from a sample of text (reads, not training)."""
    dense_sum = torch.zeros(len(bridges.sites))
    sparse_sum = torch.zeros(len(bridges.sites))
    chunks = blocks.to(dense.device).split(EVAL_BATCH)
    for ids in chunks:
        run = dense.run(ids)
        recorder = Recorder(*map(str, bridges.sites))
        student(ids, tap=recorder)
        for index, site in enumerate(bridges.sites):
            dense_sum[index] += mean_square(bridges.centred(run.resid[site])).cpu()
            sparse_sum[index] += mean_square(recorder[str(site)]).cpu()
    bridges.dense_energy.copy_(dense_sum / len(chunks))
    bridges.sparse_energy.copy_(sparse_sum / len(chunks))
