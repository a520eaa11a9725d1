"""Both models on a batch of prompts: what an edit of nodes adds to the dense stream, and what that flips."""

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.crossing import Source
from bridges.dense import DenseModel
from bridges.edit import Edit
from bridges.reading import BridgeReader
from bridges.tails import PromptTails
from extractor.sites import Recorder
from extractor.student import Student
from extractor.tasks import TaskBatch


class PromptStreams(PromptTails):
    """One pass of both models over a batch of prompts, from which every edit on it is measured."""

    @torch.no_grad()
    def __init__(
        self,
        dense: DenseModel,
        student: Student,
        bridges: BridgeSet,
        batch: TaskBatch,
        *,
        source: Source = "student",
    ):
        super().__init__(dense, batch)
        self.presented: dict[str, Tensor] = {}
        if source == "student":
            recorder = Recorder(*(site.read_address for site in bridges.sites))
            student(batch.ids, tap=recorder, logits_to_keep=1)
            self.presented = recorder.activations
        else:
            reader = BridgeReader.of(student, bridges, bridges.sites, {})
            for site, resid in self.resid.items():
                self.presented |= reader.read(site, resid)
        self.dense_rms = {site: bridges.read_scale(resid) for site, resid in self.resid.items()}

    def delta(self, edit: Edit) -> Float[Tensor, "example seq d_dense"]:
        """What the edit, a patch of reads at one site, adds at strength 1."""
        presented = self.presented[edit.site.read_address]
        counterfactual = self.batch.counterfactual(presented)
        return edit.delta(presented, counterfactual, self.dense_rms[edit.site])

    def flip_rate(self, difference: Float[Tensor, " example"]) -> float:
        """Share of the prompts answered right without the edit whose answer is another with it."""
        right = self.unedited > 0
        return (right & (difference < 0)).sum().item() / max(1, int(right.sum()))
