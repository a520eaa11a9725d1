"""An edit held live: hooks on the Hugging Face model, no weight touched, quantised or not.

    live = LiveEdit(edit, dense, student)            # source bridge needs no student
    with live.applied() as model:
        model.generate(**prompts)                    # cached or not, padded left or right

Per forward: the positions are counted; with source student, the student reads the same tokens with a cache
of its own, as far as the edit needs it; at each site the nodes' change is worked out and its delta added to
the stream. The student runs along unedited, so its activations are those of the presented text. Beam search
reorders the dense model's cache only, which the student cannot follow: use source bridge there.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
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
                prompts. What crosses by its `difference` still runs the changed student, from the site before
                the nodes to the one after.
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
        addresses = addresses_of(self.edit)
        if self.edit.source == "student":
            around = {str(site) for c in self.edit.crossings if c.via == "difference"
                      for site in (self.site_before(c), c.site)}  # fmt: skip
            return run_until(self.student, addresses | around, input_ids, **inputs)
        found: dict[str, Tensor] = {}
        for site, resid in self.dense.run(input_ids, record=self.edit.reader.sites, **inputs).resid.items():
            found |= self.edit.reader.read(site, resid)
        return {address: value for address, value in found.items() if address in addresses}

    def site_before(self, crossing: Crossing) -> Site:
        """Where a run of the student that shows this change can begin: at the embeddings, where its
        condition may read a node before it."""
        if crossing.change.condition is not None:
            return Site(0, "resid_pre")
        return crossing.change.nodes[0].site_before(parallel=self.student.config.parallel_residual)


class _Enough(Exception):
    """Everything that was asked for is known."""


def run_until(
    student: Student, addresses: Collection[str], input_ids: Tensor, *, tap: Tap = no_tap, **inputs: Any
) -> dict[str, Tensor]:
    """The student's activations at these addresses and sites; what comes after the last is not computed."""
    recorder = Recorder(*addresses)

    def record(address: str, activation: Tensor) -> Tensor:
        activation = recorder(address, activation)
        if recorder.activations.keys() == recorder.wanted:
            raise _Enough
        return activation

    if addresses:
        with suppress(_Enough):
            student(input_ids, tap=compose(tap, record), **inputs)
    return recorder.activations


def addresses_of(edit: Edit) -> set[str]:
    """Where an edit reads the student: at its nodes, and at those of its conditions."""
    conditions = {
        change.condition.node.address for change in edit.intervention.changes if change.condition is not None
    }
    return {crossing.address for crossing in edit.crossings} | conditions


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
        self.addresses = addresses_of(edit)
        self.by_difference = {i: c for i, c in enumerate(edit.crossings) if c.via == "difference"}
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
        ids = args[0] if args else kwargs.get("input_ids")
        inputs = {name: kwargs.get(name) for name in ("attention_mask", "position_ids")}
        if self.recorded is not None:
            self._take_recorded(self.recorded, kwargs["inputs_embeds"] if ids is None else ids, inputs)
        elif ids is None:
            raise InputError("an edit with source student needs input_ids; use source bridge for embeddings")
        else:
            self._run_student(ids, inputs)

    @torch.no_grad()
    def _take_recorded(
        self, recorded: Mapping[str, Tensor], tokens: Tensor, inputs: Mapping[str, Any]
    ) -> None:
        """What the student would give for these tokens, from a run of it elsewhere."""
        starts = {number: self.live.site_before(crossing) for number, crossing in self.by_difference.items()}
        sites = [*starts.values(), *(crossing.site for crossing in self.by_difference.values())]
        needed = self.addresses.union(map(str, sites))
        if missing := needed - recorded.keys():
            raise UsageError(f"presented: no activations at {min(missing)}")
        self.presented |= {address: recorded[address] for address in self.addresses}
        shapes = {tuple(value.shape[:2]) for value in self.presented.values()}
        if self.positions.start or shapes != {tuple(tokens.shape[:2])}:
            raise UsageError(
                "presented: the activations are not of the whole prompts of this forward; leave them out "
                "where tokens are generated"
            )
        for number, crossing in self.by_difference.items():
            start, site = starts[number], str(crossing.site)
            begin = {"start": start, "resid": recorded[str(start)]}
            one = self._tap_of(crossing)
            changed = run_until(self.live.student, {site}, tokens, tap=one, **begin, **inputs)
            self.differences[number] = changed[site] - recorded[site]

    @torch.no_grad()
    def _run_student(self, ids: Tensor, inputs: Mapping[str, Any]) -> None:
        plain = self._student(None, ids, inputs, no_tap)
        self.presented |= plain
        for number, crossing in self.by_difference.items():
            site, one = str(crossing.site), self._tap_of(crossing)
            self.differences[number] = self._student(number, ids, inputs, one)[site] - plain[site]

    def _tap_of(self, crossing: Crossing) -> Tap:
        """One crossing's change alone."""
        return InterventionTap(Intervention((crossing.change,)), self.positions, self.counterfactual)

    def _student(
        self, run: int | None, ids: Tensor, inputs: Mapping[str, Any], tap: Tap
    ) -> dict[str, Tensor]:
        """Activations of one run of the student, which keeps its own cache from forward to forward."""
        if self.positions.start == 0:
            self.caches[run] = DynamicCache(config=self.live.student.config)
        cache = self.caches.get(run)
        if cache is None or cache.get_seq_length() != self.positions.start:
            raise InputError(
                "the student has not read the tokens in the dense model's cache; enter applied() before the "
                "prompt, and use source bridge where a cache is cropped or reordered"
            )
        sites = {str(crossing.site) for crossing in self.by_difference.values()}
        # The first attention is always run: its cache counts the tokens read.
        wanted = {*self.addresses, *sites, "0.attn.resid_delta"}
        options = {CACHE_NAME: cache, "use_cache": True, "logits_to_keep": 1}
        return run_until(self.live.student, wanted, ids, tap=tap, **options, **inputs)

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
