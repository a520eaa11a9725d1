"""An edit held live: hooks on the Hugging Face model, no weight touched, quantised or not.

    live = LiveEdit(edit, dense, student)            # source bridge needs no student
    with live.applied() as model:
        model.generate(**prompts)                    # cached or not, padded left or right

Per forward: the positions are counted; with source student, the student reads the same tokens with a cache
of its own; at each site the nodes' change is worked out and its delta added to the stream. The student runs
along unedited, so its activations are those of the presented text. Beam search reorders the dense model's
cache only, which the student cannot follow: use source bridge there.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from bridges.crossing import Crossing
from bridges.dense import DenseModel
from bridges.edit import Edit
from bridges.hooks import add_to_input, add_to_output, hooked
from extractor.cache_name import CACHE_NAME
from extractor.errors import InputError, UsageError
from extractor.intervention import Counterfactual, Intervention, InterventionTap
from extractor.positions import PromptPositions
from extractor.sites import Recorder, Site, Tap, compose, no_tap
from extractor.student import Student


class LiveEdit:
    """An edit of one dense model in memory.

    Raises:
        InputError: made for another dense checkpoint, or its source is the student and there is none.
    """

    def __init__(self, edit: Edit, dense: DenseModel, student: Student | None = None):
        made_for = edit.hashes.dense_sha256
        if made_for not in ("none", dense.sha256):
            raise InputError(
                f"the edit was made for a dense checkpoint with weights {made_for[:12]}, this one has "
                f"{dense.sha256[:12]}"
            )
        if edit.source == "student" and student is None:
            raise InputError("this edit reads the student alongside (source student); give the student")
        self.edit, self.dense, self.student = edit, dense, student
        self.deltas: dict[Site, Float[Tensor, "batch seq d_dense"]] = {}
        """What the last forward added, by site."""

    @contextmanager
    def applied(
        self,
        *,
        strength: float = 1.0,
        last: Int[Tensor, " batch"] | None = None,
        counterfactual: Counterfactual | None = None,
        indirect: bool = False,
        presented: Mapping[str, Tensor] | None = None,
    ) -> Iterator[PreTrainedModel]:
        """The dense model under the edit.

        Args:
            strength: every strength of the edit times this.
            last: each prompt's last position; from the attention mask where it is not given.
            counterfactual: what a patch moves its nodes to, by address (`read`, then
                `TaskBatch.counterfactual`).
            indirect: take the deltas out again before the final norm, so that their direct write to the
                logits does not count.
            presented: the student's activations on exactly these prompts, at every address that a crossing
                or a condition reads (`read`), so that it does not run again. For one forward of whole
                prompts. What crosses by its `difference` runs the student all the same.
        """
        edit = self.edit.scaled(strength)
        forward = _Forward(self, edit, PromptPositions(last), counterfactual, presented)
        with ExitStack() as stack:
            before = self.dense.model.register_forward_pre_hook(forward.begin, with_kwargs=True)
            stack.enter_context(hooked(before))
            sites = set(self.edit.sites) | set(self.edit.reader.sites if self.edit.reader else ())
            for site in sites:
                self._hook_site(stack, site, forward)
            if indirect:
                hook = add_to_input(lambda resid: -sum(self.deltas.values()).view_as(resid).to(resid))
                stack.enter_context(hooked(self.dense.final_norm.register_forward_pre_hook(hook)))
            yield self.dense.model

    def _hook_site(self, stack: ExitStack, site: Site, forward: "_Forward") -> None:
        block = self.dense.blocks[site.layer]
        is_mid = site.stream == "resid_mid"
        reader = block.get_submodule(self.dense.layout.mid) if is_mid else block

        def at_site(resid: Tensor) -> Tensor:
            return forward.at_site(site, resid)

        stack.enter_context(hooked(reader.register_forward_pre_hook(add_to_input(at_site))))
        if is_mid and site in self.edit.sites:  # what reads the stream next sees it, the block passes it on
            hook = add_to_output(lambda output: self.deltas[site].view_as(output).to(output))
            stack.enter_context(hooked(block.register_forward_hook(hook)))

    @torch.no_grad()
    def read(self, input_ids: Int[Tensor, "batch seq"], **inputs: Tensor) -> dict[str, Tensor]:
        """The sparse activations at the edit's addresses on a batch, unedited, as its source tells them."""
        addresses = {crossing.address for crossing in self.edit.crossings}
        if self.edit.source == "student":
            recorder = Recorder(*addresses)
            self.student(input_ids, tap=recorder, **inputs)
            return recorder.activations
        found: dict[str, Tensor] = {}
        for site, resid in self.dense.run(input_ids, record=self.edit.reader.sites, **inputs).resid.items():
            found |= self.edit.reader.read(site, resid)
        return {address: value for address, value in found.items() if address in addresses}


class _Forward:
    """What an edit knows in one forward of the dense model."""

    def __init__(
        self,
        live: LiveEdit,
        edit: Edit,
        positions: PromptPositions,
        counterfactual: Counterfactual | None,
        recorded: Mapping[str, Tensor] | None,
    ):
        self.live, self.edit, self.positions = live, edit, positions
        self.tap = InterventionTap(edit.intervention, positions, counterfactual)
        self.counterfactual = counterfactual
        self.recorded = recorded
        self.addresses = {crossing.address for crossing in edit.crossings} | self.tap.conditions
        self.presented: dict[str, Tensor] = {}
        self.differences: dict[int, Tensor] = {}  # of the student's stream, by number of the crossing
        self.caches: dict[int | None, DynamicCache] = {}  # of the student unchanged, and of each difference

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.positions(module, args, kwargs)
        self.live.deltas.clear()
        self.presented.clear()
        self.differences.clear()
        self.tap.before.clear()
        if self.edit.source != "student":
            return
        if self.recorded is None or any(crossing.via == "difference" for crossing in self.edit.crossings):
            self._run_student(args, kwargs)
        else:
            tokens = args[0] if args else kwargs.get("input_ids")
            self._take_recorded(self.recorded, kwargs["inputs_embeds"] if tokens is None else tokens)

    def _take_recorded(self, recorded: Mapping[str, Tensor], tokens: Tensor) -> None:
        """What the student would give for these tokens, from a run of it elsewhere."""
        if missing := self.addresses - recorded.keys():
            raise UsageError(f"presented: no activations at {min(missing)}")
        self.presented |= {address: recorded[address] for address in self.addresses}
        shapes = {tuple(value.shape[:2]) for value in self.presented.values()}
        if self.positions.start or shapes != {tuple(tokens.shape[:2])}:
            raise UsageError(
                "presented: the activations are not of the whole prompts of this forward; leave them out "
                "where tokens are generated"
            )

    @torch.no_grad()
    def _run_student(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise InputError("an edit with source student needs input_ids; use source bridge for embeddings")
        inputs = {name: kwargs.get(name) for name in ("attention_mask", "position_ids")}
        plain = self._student(None, ids, inputs, no_tap)
        self.presented |= plain
        for number, crossing in enumerate(self.edit.crossings):
            if crossing.via == "difference":
                one = InterventionTap(Intervention((crossing.change,)), self.positions, self.counterfactual)
                site = str(crossing.site)
                self.differences[number] = self._student(number, ids, inputs, one)[site] - plain[site]

    def _student(self, run: int | None, ids: Tensor, inputs: dict[str, Any], tap: Tap) -> dict[str, Tensor]:
        """Activations of one run of the student, which keeps its own cache from forward to forward."""
        if self.positions.start == 0:
            self.caches[run] = DynamicCache(config=self.live.student.config)
        cache = self.caches.get(run)
        if cache is None or cache.get_seq_length() != self.positions.start:
            raise InputError(
                "the student has not read the tokens in the dense model's cache; enter applied() before the "
                "prompt, and use source bridge where a cache is cropped or reordered"
            )
        recorder = Recorder(*self.addresses, *map(str, self.edit.sites))
        options = {CACHE_NAME: cache, "use_cache": True, "logits_to_keep": 1}
        self.live.student(ids, tap=compose(tap, recorder), **options, **inputs)
        return recorder.activations

    def at_site(self, site: Site, resid: Tensor) -> Tensor:
        """The delta at a site, as it has to be added to this stream."""
        stream = resid.reshape(-1, self.positions.length, resid.shape[-1])  # OPT flattens it before its MLP
        if self.edit.reader is not None and site in self.edit.reader.sites:
            self.presented |= self.edit.reader.read(site, stream)
        delta = stream.new_zeros(stream.shape, dtype=torch.float32)
        for crossing, moved in self._moved(site, stream):
            delta = delta + crossing.delta(moved, stream)
        if site in self.edit.sites:
            self.live.deltas[site] = delta
        return delta.view_as(resid).to(resid)

    def _moved(self, site: Site, stream: Tensor) -> Iterator[tuple[Crossing, Tensor]]:
        """Each crossing here with its nodes' change; changes of one node follow one another."""
        for address in self.tap.conditions & self.presented.keys():
            self.tap.before[address] = self.presented[address]
        now: dict[str, Tensor] = {}
        for number, crossing in enumerate(self.edit.crossings):
            if crossing.site != site or not crossing.change.strength:
                continue
            if crossing.via == "difference":
                yield crossing, self.differences[number]
                continue
            address, channels = crossing.address, [node.channel for node in crossing.change.nodes]
            old = now.get(address, self.presented.get(address))
            if old is None:  # a steer needs no look at the node
                if crossing.change.kind != "steer":
                    raise UsageError(f"{address} was not read before {site}")
                old = stream.new_zeros(*stream.shape[:2], 1 + max(channels), dtype=torch.float32)
            now[address] = self.tap.apply(crossing.change, address, old)
            yield crossing, (now[address] - old)[..., channels]
