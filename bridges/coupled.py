"""Student and bridges around the frozen dense model: one forward per training step.

Calling anything but this module's `forward` in the training loop would bypass the gradient
synchronisation of several processes, silently.

    total = ce * CE + kl * KL(dense || student)
          + nmse * sum over sites of NMSE(encode(dense), sparse) + NMSE(decode(sparse), dense)
          + hybrid * (KL(dense || student from encode(dense)) + KL(dense || dense from decode(sparse)))

(Gao et al. 2025, section 2.3; sums over sites are means here.) Each hybrid mean is estimated by one sampled
site: the same expectation at a third of the cost. `multi` puts random mixtures, which switch at several
sites, in their place. By default nothing is detached: the paper writes a plain sum, so the student is also
pulled towards what its bridges can carry.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from bridges.bridge import BridgeSet
from bridges.dense import DenseModel
from bridges.losses import cross_entropy, kl_divergence, log_probs, normalised_mse
from bridges.mixture import random_path, run_path
from extractor.config import Config
from extractor.machine import whole
from extractor.sites import Recorder, Site
from extractor.student import Student


class LossConfig(Config):
    """Coefficients of the training loss."""

    ce: float = Field(0.2, ge=0)
    """Next-token cross-entropy of the student."""
    kl: float = Field(1.0, ge=0)
    """KL(dense || student)."""
    nmse: float = Field(0.1, ge=0)
    """Normalised squared errors of both bridge directions, averaged over sites."""
    hybrid: float = Field(0.5, ge=0)
    """KL of the passes that switch between the models once, averaged over sites."""
    hybrid_sites: Literal["sampled", "all", "multi"] = "sampled"
    """One site per direction and step; all of them (passes are run again in the backward pass instead
    of being held); or one mixture per direction and step that switches at several random sites."""
    switch_probability: float = Field(0.3, gt=0, le=1)
    """Of every site, with `multi`; a mixture switches once at least."""
    nmse_trains_student: bool = True
    """False: the NMSE terms train the bridges alone."""
    decoding_trains_student: bool = True
    """False: KL(dense || dense from decode(sparse)) trains the decoder alone (not with `multi`)."""


class Batch(NamedTuple):
    """Tokens, and what every hybrid pass is compared with."""

    ids: Int[Tensor, "batch seq"]
    position_ids: Int[Tensor, "batch seq"] | None
    reference: Float[Tensor, "batch seq vocab"]  # the dense model's log-probabilities


class CoupledLosses(NamedTuple):
    """Losses of one batch: nats/token, and squared errors as a share of the site's energy."""

    total: Tensor
    ce: Tensor
    kl: Tensor
    nmse: Tensor
    kl_dense_to_sparse: Tensor
    kl_sparse_to_dense: Tensor


class CoupledModel(nn.Module):
    """What `accelerator.prepare` wraps. The dense model is held but not registered."""

    _no_split_modules = Student._no_split_modules  # what FSDP shards one by one

    def __init__(self, student: Student, bridges: BridgeSet, dense: DenseModel, config: LossConfig):
        super().__init__()
        self.student = student
        self.bridges = bridges
        self.config = config
        self._held = (dense,)  # a tuple hides it from nn.Module: no copies, no gradients, no saves

    @property
    def dense(self) -> DenseModel:
        return self._held[0]

    @torch.no_grad()
    def whole(self) -> tuple[Student, BridgeSet]:
        """Student and bridges with all of their weights on this process; every process must call it."""
        if not any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            return self.student, self.bridges
        student, bridges = Student(self.student.config), self.bridges.like()
        for module, own in ((student, self.student), (bridges, self.bridges)):
            module.load_state_dict({name: whole(value) for name, value in own.state_dict().items()})
        return student.to(self.dense.device), bridges.to(self.dense.device)

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        position_ids: Int[Tensor, "batch seq"] | None = None,
        *,
        seed: int,
        step: int,
    ) -> CoupledLosses:
        """All losses of a batch; (seed, step) choose the hybrid sites, alike on every process."""
        with torch.no_grad():
            run = self.dense.run(input_ids, position_ids=position_ids)
            reference = log_probs(run.logits)
        recorder = Recorder(*map(str, self.bridges.sites))
        own = log_probs(self.student(input_ids, position_ids=position_ids, tap=recorder).logits)
        ce = cross_entropy(own, input_ids)
        kl = kl_divergence(reference, own)

        dense_resid = {site: self.bridges.centred(x) for site, x in run.resid.items()}
        nmse = self._nmse(dense_resid, recorder)
        batch = Batch(input_ids, position_ids, reference)
        if self.config.hybrid_sites == "multi":
            to_sparse, to_dense = self._mixtures(batch, run.resid, recorder, seed, step)
        else:
            to_sparse, to_dense = self._single_switches(batch, dense_resid, recorder, seed, step)
        config = self.config
        total = config.ce * ce + config.kl * kl + config.nmse * nmse
        total = total + config.hybrid * (to_sparse + to_dense)
        return CoupledLosses(total, ce, kl, nmse, to_sparse, to_dense)

    def _single_switches(
        self, batch: Batch, dense_resid: dict[Site, Tensor], recorder: Recorder, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        encode_sites, decode_sites = self._hybrid_sites(seed, step)
        to_sparse = [
            self._run(self._dense_to_sparse, batch, site, dense_resid[site]) for site in encode_sites
        ]
        to_dense = [
            self._run(self._sparse_to_dense, batch, site, recorder[str(site)]) for site in decode_sites
        ]
        return torch.stack(to_sparse).mean(), torch.stack(to_dense).mean()

    def _mixtures(
        self, batch: Batch, dense_resid: dict[Site, Tensor], recorder: Recorder, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """KL of a random mixture that begins in the dense model, and of one that begins in the student."""
        divergences = []
        for starts_dense in (True, False):
            path = random_path(
                self.bridges.sites, self.config.switch_probability, starts_dense, [seed, step, starts_dense]
            )
            first = dense_resid[path.switches[0]] if starts_dense else recorder[str(path.switches[0])]
            models = (self.dense, self.student, self.bridges)
            logits = run_path(path, *models, batch.ids, batch.position_ids, first=first)
            divergences.append(kl_divergence(batch.reference, log_probs(logits)))
        return divergences[0], divergences[1]

    def _nmse(self, dense_resid: dict[Site, Tensor], recorder: Recorder) -> Tensor:
        energy = self.bridges.dense_energy
        errors = []
        for index, site in enumerate(self.bridges.sites):
            bridge, sparse = self.bridges[site], recorder[str(site)]
            if not self.config.nmse_trains_student:
                sparse = sparse.detach()
            encoded = bridge.encode(dense_resid[site])
            # The dense energy in both: an orthogonal turn keeps it, and a student cannot lower its
            # loss by shrinking. The energies differ by the widths' ratio (mean over channels).
            ratio = dense_resid[site].shape[-1] / sparse.shape[-1]
            errors.append(normalised_mse(encoded, sparse, energy[index] * ratio))
            errors.append(normalised_mse(bridge.decode(sparse), dense_resid[site], energy[index]))
        return torch.stack(errors).sum() / len(self.bridges.sites)

    def _hybrid_sites(self, seed: int, step: int) -> tuple[list[Site], list[Site]]:
        all_sites = self.bridges.sites
        if self.config.hybrid_sites == "all":
            return list(all_sites), list(all_sites)
        chosen = np.random.default_rng([seed, step]).integers(len(all_sites), size=2)
        return [all_sites[chosen[0]]], [all_sites[chosen[1]]]

    def _run(self, hybrid_pass: Callable[..., Tensor], *args: object) -> Tensor:
        """Over all sites, passes free what they have used: each is run again when its gradient is due."""
        if self.config.hybrid_sites == "all" and torch.is_grad_enabled():
            return checkpoint(hybrid_pass, *args, use_reentrant=False)
        return hybrid_pass(*args)

    def _dense_to_sparse(self, batch: Batch, site: Site, resid: Tensor) -> Tensor:
        """KL(dense || student run from the encoded dense stream)."""
        encoded = self.bridges[site].encode(resid)
        output = self.student(batch.ids, position_ids=batch.position_ids, start=site, resid=encoded)
        return kl_divergence(batch.reference, log_probs(output.logits))

    def _sparse_to_dense(self, batch: Batch, site: Site, resid: Tensor) -> Tensor:
        """KL(dense || dense run from the decoded sparse stream)."""
        if not self.config.decoding_trains_student:
            resid = resid.detach()
        decoded = self.bridges[site].decode(resid)
        logits = self.dense.run_from(site, decoded, position_ids=batch.position_ids)
        return kl_divergence(batch.reference, log_probs(logits))
