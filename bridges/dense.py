"""The frozen dense checkpoint, seen through its sites.

One adapter of forward hooks; no Hugging Face forward is written again. A family is a few attribute
names (`bridges.families`): where its blocks are, which module reads the stream after attention, and so on.

- record:  hooks keep the block's input (resid_pre) and the input of what reads it next (resid_mid).
- run_from: blocks before the site become the identity, the site's block takes the given stream, and
           for resid_mid its attention writes zero; the rest is the model's own forward.
- adding:  hooks add a delta at a site, also under `generate()` with its cache, and may take it out again
           before the final norm, so that only what later blocks make of it counts (the indirect effect).

Blocks whose attention and MLP read the same stream have no resid_mid.

At load the model proves the adapter on itself: replacing every site by its own recording must leave
the logits as they are, or nothing goes on.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from bridges.checkpoint import DenseConfig, load_dense
from bridges.families import family_of, removes_mean
from bridges.hooks import (
    PositionsSeen,
    Reached,
    add_to_input,
    add_to_output,
    forward_replaced,
    hooked,
    keep_output,
    replace_input,
)
from extractor.errors import UnsupportedModelError
from extractor.machine import attend
from extractor.sites import Site, sites

ATTENTION = "sparsebridge_sdpa"
SELF_CHECK_TOLERANCE = 1e-5  # of the largest value; the same numbers in the same order differ by 0


@dataclass(frozen=True)
class DenseRun:
    """Logits and the residual stream at each recorded site."""

    logits: Float[Tensor, "batch seq vocab"]
    resid: dict[Site, Float[Tensor, "batch seq d_dense"]]


class DenseModel:
    """A frozen causal language model whose residual stream can be read, replaced and run from."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str = "in memory",
        sha256: str = "none",
        facts: dict[str, object] | None = None,
        allow_unlisted: bool = False,
    ):
        self.family = family_of(model, allow_unlisted)
        self.layout = self.family.layout
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.sha256 = sha256
        self.facts = facts or {}
        self.config = model.config
        self.blocks: nn.ModuleList = model.get_submodule(self.layout.blocks)
        self.final_norm = model.get_submodule(self.layout.final_norm)
        self.is_parallel = self.layout.is_parallel(model.config)
        self.sites = sites(len(self.blocks), parallel=self.is_parallel)
        self.removes_mean = removes_mean(self.final_norm, self.width, model.device)
        # What blocks and attentions return: a tensor, or a tuple that begins with one.
        self._returns: dict[str, int | None] = {}
        if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
            model.set_attn_implementation(ATTENTION)
        self.check()

    @classmethod
    def from_pretrained(
        cls,
        config: DenseConfig | str | Path,
        *,
        device: torch.device | str = "cpu",
        plain: bool = False,
    ) -> "DenseModel":
        """Load a checkpoint with its tokenizer and prove the adapter on it.

        `plain` loads it unquantised and with its PEFT adapter merged, whatever the config says.

        Raises:
            InputError: what cannot be trusted or does not fit (see `bridges.checkpoint`).
            UnsupportedModelError: a family that is not listed, or fails the self-check.
        """
        if not isinstance(config, DenseConfig):
            config = DenseConfig(path=str(config))
        loaded = load_dense(config, device, plain=plain)
        return cls(
            loaded.model,
            loaded.tokenizer,
            name=loaded.name,
            sha256=loaded.sha256,
            facts=loaded.facts,
            allow_unlisted=config.allow_unlisted,
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.config.hidden_size

    def shard_(self, device: torch.device) -> None:
        """Spread the weights over all processes (FSDP2); every forward is then a collective call."""
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def run(
        self,
        input_ids: Int[Tensor, "batch seq"],
        record: bool | Collection[Site] = True,
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
    ) -> DenseRun:
        """The model's own forward; keeps the residual stream at every site, at these, or at none."""
        wanted = record if not isinstance(record, bool) else self.sites if record else ()
        resid: dict[Site, Tensor] = {}
        with ExitStack() as stack:
            for site in wanted:
                stack.enter_context(self._reading(site, resid, input_ids.shape))
            logits = self._forward(position_ids, input_ids=input_ids)
        return DenseRun(logits, resid)

    def run_to(
        self,
        site: Site,
        input_ids: Int[Tensor, "batch seq"],
        start: Site,
        resid: Float[Tensor, "batch seq d_dense"],
        *,
        position_ids: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq d_dense"]:
        """The residual stream at `site`, from the stream at an earlier site."""
        block = self.blocks[site.layer]
        module = block.get_submodule(self.layout.mid) if site.stream == "resid_mid" else block

        def stop(module: nn.Module, args: tuple) -> None:
            raise Reached(args[0].view(*input_ids.shape, -1))

        with ExitStack() as stack:
            self._starting_at(stack, start, resid)  # before `stop`: hooks run in the order they were set
            stack.enter_context(hooked(module.register_forward_pre_hook(stop)))
            try:
                self._forward(position_ids, inputs_embeds=resid)
            except Reached as reached:
                return reached.resid
        raise AssertionError(f"the dense model never reached {site}")

    def run_from(
        self,
        site: Site,
        resid: Float[Tensor, "batch seq d_dense"],
        *,
        removed: Float[Tensor, "batch seq d_dense"] | None = None,
        position_ids: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits when the residual stream at `site` is `resid`; earlier sublayers do not run.

        `removed` is subtracted before the final norm: for a delta that is part of `resid`, what it
        writes into the logits directly goes, what later sublayers make of it stays.
        """
        with ExitStack() as stack:
            self._starting_at(stack, site, resid)
            if removed is not None:
                hook = self.final_norm.register_forward_pre_hook(add_to_input(lambda x: -removed))
                stack.enter_context(hooked(hook))
            return self._forward(position_ids, inputs_embeds=resid)

    def _starting_at(self, stack: ExitStack, site: Site, resid: Tensor) -> None:
        """Earlier sublayers pass on what they get, and the site's block gets `resid`."""
        block = self.blocks[site.layer]
        for earlier in self.blocks[: site.layer]:
            stack.enter_context(forward_replaced(earlier, self._passing_on))
        stack.enter_context(hooked(block.register_forward_pre_hook(replace_input(resid))))
        if site.stream == "resid_mid":
            stack.enter_context(self._without_attention(block))

    def _forward(self, position_ids: Tensor | None, **inputs: Tensor) -> Float[Tensor, "batch seq vocab"]:
        if position_ids is not None:  # not every family takes them
            inputs["position_ids"] = position_ids
        return self.model(**inputs, use_cache=False).logits

    @contextmanager
    def adding(
        self,
        site: Site,
        delta: Float[Tensor, "batch seq d_dense"] | Float[Tensor, " d_dense"],
        *,
        indirect: bool = False,
    ) -> Iterator[PreTrainedModel]:
        """The model with `delta` added to its residual stream at `site`.

        A delta with positions belongs to the first `seq` positions of each sequence, wherever a forward
        starts: under `generate()` the positions that the cache has seen already are counted. One without
        is added at every position. With `indirect` it is subtracted before the final norm (`run_from`).
        """
        block = self.blocks[site.layer]
        seen = PositionsSeen()

        def part(resid: Tensor) -> Tensor:
            return delta if delta.ndim == 1 else seen.part_of(delta, resid)

        handles = [self.model.register_forward_pre_hook(seen, with_kwargs=True)]
        if site.stream == "resid_pre":
            handles.append(block.register_forward_pre_hook(add_to_input(part)))
        else:
            # What reads the stream next sees the delta, and the block passes it on.
            reader = block.get_submodule(self.layout.mid)
            handles.append(reader.register_forward_pre_hook(add_to_input(part)))
            handles.append(block.register_forward_hook(add_to_output(part)))
        if indirect:
            hook = add_to_input(lambda resid: -part(resid))
            handles.append(self.final_norm.register_forward_pre_hook(hook))
        with ExitStack() as stack:
            for handle in handles:
                stack.enter_context(hooked(handle))
            yield self.model

    @torch.no_grad()
    def check(self) -> None:
        """Prove the adapter on a short input: the unhooked forward, and three more at most.

        1. Every block's input is recorded and replaced by its recording: the same logits, bit for bit.
        2. Every block gets its recorded resid_mid instead, without attention: what it passes on must be
           the next site's recording. So a tail from any site ends in the same logits, by induction.

        Raises:
            UnsupportedModelError: a site's recording, put back, changes what follows.
        """
        length = min(8, getattr(self.config, "max_position_embeddings", None) or 8)
        ids = torch.arange(1, 1 + length, device=self.device)[None] % self.config.vocab_size
        plain = self.model(ids, use_cache=False).logits
        with ExitStack() as stack:
            attention = getattr(self.blocks[0], self.layout.attention)
            for name, module in (("block", self.blocks[0]), ("attention", attention)):
                stack.enter_context(hooked(module.register_forward_hook(self._noting_output(name))))
            for block in self.blocks:
                stack.enter_context(hooked(block.register_forward_pre_hook(replace_input(None))))
            run = self.run(ids)
        if not torch.equal(run.logits, plain):
            self._fail(f"recording {self.sites[0]} and later", run.logits, plain)
        if not self.is_parallel:
            self._check_mids(ids, run)
        last = self.sites[-1]
        self._compare(f"running the tail from {last}", self.run_from(last, run.resid[last]), plain)

    @torch.no_grad()
    def check_documents_apart(self) -> None:
        """Prove that position ids alone keep packed documents apart, as transformers' masks promise.

        Raises:
            UnsupportedModelError: a document's logits change with what stands before it in its block.
        """
        ids = torch.arange(1, 9, device=self.device)[None] % self.config.vocab_size
        positions = torch.arange(8, device=self.device)[None] % 4
        packed = self.run(ids, record=False, position_ids=positions).logits[:, 4:]
        alone = self.run(ids[:, 4:], record=False).logits
        moved, scale = (packed - alone).abs().max().item(), alone.abs().max().item()
        if not moved <= 1e-4 * scale:
            raise UnsupportedModelError(
                f"data.separate_documents: in '{self.config.model_type}' a packed document sees the one "
                f"before it (logits move by {moved:.2e} of {scale:.2f}); set it to false"
            )

    def _check_mids(self, ids: Tensor, run: DenseRun) -> None:
        mids = [site for site in self.sites if site.stream == "resid_mid"]
        passed_on: dict[Site, Tensor] = {}
        with ExitStack() as stack:
            for site, block in zip(mids, self.blocks, strict=True):
                mid = run.resid[site]
                stack.enter_context(hooked(block.register_forward_pre_hook(replace_input(mid))))
                stack.enter_context(self._without_attention(block))
                hook = block.register_forward_hook(keep_output(passed_on, site))
                stack.enter_context(hooked(hook))
            logits = self.model(ids, use_cache=False).logits
        for site in mids[:-1]:
            following = Site(site.layer + 1, "resid_pre")
            name = f"replacing {site} by its own recording"
            self._compare(name, passed_on[site], run.resid[following])
        self._compare(f"replacing {mids[-1]} by its own recording", logits, run.logits)

    def _compare(self, what: str, got: Tensor, expected: Tensor) -> None:
        moved = (got - expected).abs().max().item()
        # written so that a NaN fails, too
        if not moved <= SELF_CHECK_TOLERANCE * expected.abs().max().item():
            self._fail(what, got, expected)

    def _fail(self, what: str, got: Tensor, expected: Tensor) -> None:
        moved, scale = (got - expected).abs().max().item(), expected.abs().max().item()
        raise UnsupportedModelError(
            f"{self.name} ({self.config.model_type}): {what} changes what follows by {moved:.2e} "
            f"(allowed {SELF_CHECK_TOLERANCE:.0e} of {scale:.2f}); its residual stream is not where "
            "the adapter looks for it"
        )

    @contextmanager
    def _reading(self, site: Site, into: dict[Site, Tensor], shape: torch.Size) -> Iterator[None]:
        block = self.blocks[site.layer]
        module = block.get_submodule(self.layout.mid) if site.stream == "resid_mid" else block

        def keep(module: nn.Module, args: tuple) -> None:
            into[site] = args[0].view(*shape, -1)  # OPT flattens the stream before its MLP

        with hooked(module.register_forward_pre_hook(keep)):
            yield

    def _noting_output(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple, output: object) -> None:
            self._returns[name] = len(output) if isinstance(output, tuple) else None

        return note

    def _like_output_of(self, name: str, hidden: Tensor) -> object:
        count = self._returns[name]
        return hidden if count is None else (hidden, *[None] * (count - 1))

    def _passing_on(self, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        return self._like_output_of("block", hidden_states)

    def _without_attention(self, block: nn.Module) -> AbstractContextManager[None]:
        attention = getattr(block, self.layout.attention)

        def write_nothing(hidden_states: Tensor, *args: object, **kwargs: object) -> object:
            return self._like_output_of("attention", torch.zeros_like(hidden_states))

        return forward_replaced(attention, write_nothing)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """transformers' own sdpa, in the precision that this machine runs it well in."""
    return attend(_sdpa, query, key, value, module, mask, kwargs), None


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, module: nn.Module, mask: Tensor | None, kwargs: dict[str, object]
) -> Tensor:
    return sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0]


# Without the second line transformers would drop the mask, and the model see the future, silently.
AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
