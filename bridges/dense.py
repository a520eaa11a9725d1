"""The frozen dense checkpoint, seen through its sites.

One adapter of forward hooks; no Hugging Face forward is written again. A family is a few attribute
names (`FAMILIES`): where its blocks are, which norm reads the stream before the MLP, and so on.

- record:  hooks keep the block's input (resid_pre) and the MLP norm's input (resid_mid).
- run_from: blocks before the site become the identity, the site's block takes the given stream, and
           for resid_mid its attention writes zero; the rest is the model's own forward.
- adding:  hooks add a delta at a site, and may take it out again before the final norm, so that only
           what later blocks make of it counts (the indirect effect).

At load the model proves the adapter on itself: replacing every site by its own recording must leave
the logits as they are, or nothing goes on.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from extractor.artifacts import fingerprint
from extractor.errors import InputError, UnsupportedModelError
from extractor.machine import attend
from extractor.sites import Site, sites

ATTENTION = "sparsebridge_sdpa"
SELF_CHECK_TOLERANCE = 1e-5  # of the largest logit; the same numbers in the same order differ by 0


@dataclass(frozen=True)
class Family:
    """Where a family keeps what the adapter hooks, as attribute paths."""

    blocks: str
    attention: str
    mlp_norm: str
    final_norm: str
    # LayerNorm removes the mean of the stream, so the mean carries nothing.
    removes_mean: bool


FAMILIES = {
    "gpt2": Family("transformer.h", "attn", "ln_2", "transformer.ln_f", removes_mean=True),
}


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
    ):
        self.family = _family(model.config.model_type)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.sha256 = sha256
        self.config = model.config
        self.blocks: nn.ModuleList = model.get_submodule(self.family.blocks)
        self.final_norm = model.get_submodule(self.family.final_norm)
        self.sites = sites(len(self.blocks))
        self.check()

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> "DenseModel":
        """Load a checkpoint folder in fp32 with its tokenizer.

        Raises:
            InputError: no such folder, no safetensors, damaged, missing or non-finite weights.
            UnsupportedModelError: a family that is not in `FAMILIES`.
        """
        folder = Path(folder)
        _check_folder(folder)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[problem]:
                raise InputError(
                    f"'{folder}': {problem.replace('_', ' ')} {sorted(map(str, info[problem]))[:3]}"
                    "; the weights do not fit the config"
                )
        _check_finite(folder, model)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if len(tokenizer) > model.config.vocab_size:
            raise InputError(
                f"'{folder}': the tokenizer has {len(tokenizer)} entries, the embedding "
                f"{model.config.vocab_size}; this is not the checkpoint's own tokenizer"
            )
        return cls(model.to(device), tokenizer, name=str(folder), sha256=fingerprint(folder))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def run(self, input_ids: Int[Tensor, "batch seq"], record: bool = True) -> DenseRun:
        """The model's own forward; with `record`, the residual stream at every site."""
        resid: dict[Site, Tensor] = {}
        with ExitStack() as stack:
            if record:
                for site in self.sites:
                    stack.enter_context(self._reading(site, resid))
            logits = self.model(input_ids, use_cache=False).logits
        return DenseRun(logits, resid)

    def run_from(
        self,
        site: Site,
        resid: Float[Tensor, "batch seq d_dense"],
        *,
        removed: Float[Tensor, "batch seq d_dense"] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits when the residual stream at `site` is `resid`; earlier sublayers do not run.

        `removed` is subtracted before the final norm: for a delta that is part of `resid`, what it
        writes into the logits directly goes, what later sublayers make of it stays.
        """
        block = self.blocks[site.layer]
        with ExitStack() as stack:
            for earlier in self.blocks[: site.layer]:
                stack.enter_context(_forward_replaced(earlier, _return_input))
            stack.enter_context(_hooked(block.register_forward_pre_hook(_replace_input(resid))))
            if site.stream == "resid_mid":
                attention = getattr(block, self.family.attention)
                stack.enter_context(_forward_replaced(attention, _write_nothing))
            if removed is not None:
                hook = self.final_norm.register_forward_pre_hook(_add_to_input(-removed))
                stack.enter_context(_hooked(hook))
            return self.model(inputs_embeds=resid, use_cache=False).logits

    @contextmanager
    def adding(
        self,
        site: Site,
        delta: Float[Tensor, "batch seq d_dense"],
        *,
        indirect: bool = False,
    ) -> Iterator[PreTrainedModel]:
        """The model with `delta` added to its residual stream at `site`.

        With `indirect` the same delta is subtracted before the final norm (see `run_from`).
        """
        block = self.blocks[site.layer]
        with ExitStack() as stack:
            if site.stream == "resid_pre":
                hook = block.register_forward_pre_hook(_add_to_input(delta))
            else:
                attention = getattr(block, self.family.attention)
                hook = attention.register_forward_hook(_add_to_output(delta))
            stack.enter_context(_hooked(hook))
            if indirect:
                hook = self.final_norm.register_forward_pre_hook(_add_to_input(-delta))
                stack.enter_context(_hooked(hook))
            yield self.model

    @torch.no_grad()
    def check(self) -> None:
        """Prove the adapter on a short input.

        Raises:
            UnsupportedModelError: replacing a site by its own recording moves the logits.
        """
        length = min(8, getattr(self.config, "max_position_embeddings", 8))
        ids = torch.arange(1, 1 + length, device=self.device)[None] % self.config.vocab_size
        plain = self.run(ids, record=False).logits
        run = self.run(ids)
        scale = plain.abs().max().item()
        for site in self.sites:
            moved = (self.run_from(site, run.resid[site]) - plain).abs().max().item()
            # written so that a NaN fails, too
            if not moved <= SELF_CHECK_TOLERANCE * scale:
                raise UnsupportedModelError(
                    f"{self.name}: replacing {site} by its own recording moves the logits by "
                    f"{moved:.2e} (allowed {SELF_CHECK_TOLERANCE:.0e} of {scale:.2f})"
                )

    @contextmanager
    def _reading(self, site: Site, into: dict[Site, Tensor]) -> Iterator[None]:
        block = self.blocks[site.layer]
        mid = site.stream == "resid_mid"
        module = getattr(block, self.family.mlp_norm) if mid else block

        def keep(module: nn.Module, args: tuple) -> None:
            into[site] = args[0]

        with _hooked(module.register_forward_pre_hook(keep)):
            yield


def _family(model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model family '{model_type}' is not supported; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def _check_folder(folder: Path) -> None:
    """Refuse what can be refused from the files alone, before any weight is read."""
    if not (folder / "config.json").is_file():
        raise InputError(f"dense checkpoint: no config.json in '{folder}'; give a Hugging Face model folder")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"'{folder}/config.json' is not valid JSON ({error})") from None
    if "auto_map" in config:
        raise InputError(f"'{folder}' asks to run its own code (auto_map); that is refused")
    _family(str(config.get("model_type")))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"'{folder}' has no .safetensors weights; pickled weights are refused")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise InputError(f"'{file}' is damaged ({error})") from None


def _check_finite(folder: Path, model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        bad = parameter.numel() - int(parameter.isfinite().sum())
        if bad:
            raise InputError(f"'{folder}': {bad} values of '{name}' are NaN or infinite")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """transformers' own sdpa, in the precision that this machine runs it well in."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0]

    return attend(sdpa, query, key, value), None


# Without the second line transformers would drop the mask, and the model see the future, silently.
AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


# --- hooks -----------------------------------------------------------------------------------------


@contextmanager
def _hooked(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _return_input(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    return hidden_states


def _write_nothing(hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
    return torch.zeros_like(hidden_states), None


def _replace_input(value: Tensor) -> Callable[..., tuple]:
    return lambda module, args: (value, *args[1:])


def _add_to_input(delta: Tensor) -> Callable[..., tuple]:
    return lambda module, args: (args[0] + delta, *args[1:])


def _add_to_output(delta: Tensor) -> Callable[..., tuple]:
    return lambda module, args, output: (output[0] + delta, *output[1:])
