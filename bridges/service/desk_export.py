"""What a setting of the desk does beside its prompt: to held-out text, and as an adapter for others."""

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridges.adapter_effect import settle, unmet_by_fit
from bridges.edit import Edit, EditLimits, refuse, unmet_limits
from bridges.edit_adapter import export_adapter
from bridges.live import LiveEdit
from bridges.losses import log_probs
from bridges.low_rank import Prompts
from bridges.off_target import HeldOutText
from bridges.run_models import RunModels
from bridges.steering import DIRECTIONS
from bridges.steering_gate import GateConfig, steering_forms
from bridges.streams import PromptStreams
from extractor.artifacts import read_json
from extractor.circuit import Circuit
from extractor.data import DataConfig
from extractor.errors import InputError
from extractor.statistics import mean_interval, undefined

TEXT_BLOCKS = 32  # as many of everything as recipes/edit.py measures
TRAIN_PAIRS = 32
HELD_OUT_PAIRS = 64
RANK = 16
BATCH = 16


class EditBench:
    """Text, training and held-out prompts of a run, on which edits are measured and adapters fitted."""

    def __init__(self, models: RunModels, data: DataConfig):
        self.models, self.data = models, data
        self._streams: tuple[str, PromptStreams] | None = None  # of the task that was asked for last

    @cached_property
    def text(self) -> HeldOutText:
        """Raises InputError where the run's text is not there any more."""
        return HeldOutText(self.models.dense, *self.models.text(self.data, "held_out", TEXT_BLOCKS))

    @cached_property
    def train_text(self) -> HeldOutText:
        """What a steering's gate learns to stay shut on."""
        return HeldOutText(self.models.dense, *self.models.text(self.data, "train", TEXT_BLOCKS))

    def off_target(self, circuit: Circuit, live: LiveEdit) -> dict[str, Any]:
        """KL(unedited || edited) on held-out text: `kl` in nats/token with its interval over blocks,
        `share_of_tokens` at which something is added, and the `form` that was measured.

        Text has no counterfactual, so a patch of reads at one site is measured as recipes/edit.py does: in
        its gated steering form, in the direction that moves training answers further. What has no meaning on
        text is undefined.
        """
        (change,) = live.edit.intervention.changes
        if change.positions != "all":
            return undefined(f"positions '{change.positions}' are those of a prompt, which text has not")
        try:
            if change.kind == "patch":
                return self._steering_on_text(circuit, live.edit)
            return self._edit_on_text(live)
        except InputError as error:
            return undefined(str(error))

    def _edit_on_text(self, live: LiveEdit) -> dict[str, Any]:
        kl, touched = [], []
        for part in torch.arange(len(self.text.blocks)).split(BATCH):
            ids, at = self.text.blocks[part], self.text.position_ids
            options = {} if at is None else {"position_ids": at[part]}
            reference = log_probs(live.dense.run(ids, record=False, **options).logits)
            with live.applied(presented=live.read(ids, **options)) as model:
                own = log_probs(model(ids, use_cache=False, **options).logits)
            kl.append((reference.exp() * (reference - own)).sum(-1))
            touched.append(sum(delta.any(-1) for delta in live.deltas.values()) > 0)
        return {
            "form": "the edit itself",
            "kl": _interval(torch.cat(kl).mean(1)),
            "share_of_tokens": torch.cat(touched).float().mean().item(),
        }

    def _steering_on_text(self, circuit: Circuit, edit: Edit) -> dict[str, Any]:
        if len(edit.crossings) > 1 or edit.crossings[0].via != "read":
            return undefined(
                "a patch needs a counterfactual, which text has not; reads at one site have a form without"
            )
        train, parts = self._train(circuit), (self.models.student, self.models.bridges)
        strength = edit.crossings[0].change.strength
        trials = steering_forms(edit, train, *parts, self.train_text, [strength], GateConfig())
        main = min(DIRECTIONS, key=lambda side: trials[side].moved)
        effect = self.text.effect(trials[main].steering, strength)
        return {
            "form": f"gated steering of the {main} prompts",
            "kl": _interval(effect.kl_by_block),
            "share_of_tokens": effect.share_of_tokens,
        }

    def _train(self, circuit: Circuit) -> PromptStreams:
        if self._streams is None or self._streams[0] != circuit.task:
            batch = self.models.prompts(circuit, "train", TRAIN_PAIRS)
            self._streams = (circuit.task, self.models.streams(batch))
        return self._streams[1]

    def export(
        self, circuit: Circuit, edit: Edit, folder: Path, limits: EditLimits, *, force: bool
    ) -> dict[str, Any]:
        """Fit an adapter to the edit as recipes/edit.py ships it, and say how near it comes.

        Raises:
            InputError: limits that are not met, unless `force`; an edit that one adapter cannot hold.
        """
        models = self.models
        off_target = self.off_target(circuit, LiveEdit(edit, models.dense, models.student))
        edit = replace(edit, refusals=self._refusals(edit, limits, off_target))
        refuse(edit.refusals, f"adapter '{folder.name}'", force)
        live = LiveEdit(edit, models.dense, models.student)
        others = [
            models.prompts(other, "train", TRAIN_PAIRS)
            for other in models.circuits.values()
            if other is not circuit
        ]
        train = Prompts.of_task(models.prompts(circuit, "train", TRAIN_PAIRS), live)
        facts = export_adapter(
            live,
            folder,
            fit_on=[train, *(Prompts(other.ids, other.last) for other in others)],
            held_out=[Prompts.of_task(models.prompts(circuit, "held_out", HELD_OUT_PAIRS), live)],
            rank=RANK,
        )
        facts = settle(folder, facts, unmet_by_fit(facts, limits), force=force)
        refuse(facts.get("refused", ()), f"adapter '{folder.name}'", force)
        return {"off_target": off_target, **facts}

    def _refusals(self, edit: Edit, limits: EditLimits, off_target: dict[str, Any]) -> tuple[str, ...]:
        """The limits that are not met. An effect that could not be measured meets none."""
        evaluation = read_json(self.models.run / "evaluation.json", "evaluation", "recipes/train.py")
        kl = off_target.get("kl", off_target)
        unmet = unmet_limits(edit, limits, evaluation["bridges"], kl.get("value"))
        return unmet + ((f"off-target KL undefined ({kl['undefined']})",) if "undefined" in kl else ())


def _interval(kl_by_block: Tensor) -> dict[str, Any]:
    return mean_interval(kl_by_block.cpu(), torch.arange(len(kl_by_block)), bounds=(0, math.inf))
