"""What the adapter and the exact copy need to know of each model family: names, and little else.

`Layout` is what the hooks of `bridges.dense` need. `CopySpec` says where `bridges.warm_start` finds the
weights; a family without one gets a student from random weights, and `FAMILIES` says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bridges.projections import (
    MlpReads,
    Qkv,
    affine,
    bigcode_qkv,
    falcon_kv_heads,
    fused_gate,
    grouped,
    plain,
    separate,
    stacked,
)
from extractor.errors import UnsupportedModelError


@dataclass(frozen=True)
class Layout:
    """Where a family keeps what the hooks touch, as attribute paths."""

    blocks: str = "model.layers"
    attention: str = "self_attn"
    mid: str = "post_attention_layernorm"
    """The module of a block that is the first to read the stream after attention."""
    final_norm: str = "model.norm"
    is_parallel: Callable[[Any], bool] = lambda config: False
    """Attention and MLP read the same stream, so there is no site between them."""


@dataclass(frozen=True)
class CopySpec:
    """Where a block's weights are, and the family's constants. Paths start at the block."""

    qkv: Qkv
    out: str = "self_attn.o_proj"
    mlp_reads: MlpReads = lambda block: (affine(block.mlp.gate_proj), affine(block.mlp.up_proj))
    down: str = "mlp.down_proj"
    attn_norm: tuple[str, ...] = ("input_layernorm",)
    """The first of these that a block has; none: attention reads the stream as it is."""
    mlp_norm: tuple[str, ...] = ("post_attention_layernorm",)
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    qk_norm: str | None = None
    gain_offset: float = 0.0
    """Gemma keeps gains as differences from one."""
    embed: str = "model.embed_tokens"
    positions: str | None = None
    position_offset: int = 0
    attention_scale: float | None = None
    """A fixed factor of the scores; None: what the attention module calls `scaling`, or 1/sqrt(d_head)."""
    interleaved_rope: bool = False
    """Neighbouring channels are a rotary pair, instead of channels half a head apart."""
    refuses: Callable[[Any], str | None] = lambda config: None
    """An option of the family that the student does not have, if the config uses one."""


@dataclass(frozen=True)
class Family:
    """One family: its layout, and how it is copied or why it is not."""

    layout: Layout
    copy: CopySpec | None = None
    no_copy: str = ""


# --- options that the student does not have --------------------------------------------------------------


def _unless(*conditions: tuple[str, Callable[[Any], bool]]) -> Callable[[Any], str | None]:
    return lambda config: next((name for name, is_used in conditions if is_used(config)), None)


_OPT_POST_NORM = ("norms after the residual add", lambda c: not c.do_layer_norm_before)
_OPT_PROJECTED = ("projected embeddings", lambda c: c.word_embed_proj_dim != c.hidden_size)
_ALIBI = ("ALiBi positions", lambda c: c.alibi)
_QK_LAYER_NORM = (
    "LayerNorm on q and k",
    lambda c: getattr(c, "use_qk_norm", False) or getattr(c, "qk_layernorm", False),
)
_CLIPPED = ("clipped q, k, v", lambda c: c.clip_qkv is not None)

# --- the table -------------------------------------------------------------------------------------------

_LLAMA_QKV = separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = Layout()
_ALWAYS_PARALLEL = Layout(mid="mlp", is_parallel=lambda config: True)
_LLAMA_COPY = CopySpec(_LLAMA_QKV)
_HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "qk_norm": "head"}
_SANDWICH = Layout(mid="pre_feedforward_layernorm")
_SANDWICH_COPY = {
    "mlp_norm": ("pre_feedforward_layernorm",),
    "attn_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
    "gain_offset": 1.0,
}
_GPT2 = Layout("transformer.h", "attn", "ln_2", "transformer.ln_f")
_GPT2_COPY = {
    "mlp_reads": plain("mlp.c_fc"),
    "down": "mlp.c_proj",
    "attn_norm": ("ln_1",),
    "mlp_norm": ("ln_2",),
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
}
_OLMO2 = Family(
    Layout(mid="mlp"),
    CopySpec(
        _LLAMA_QKV,
        attn_norm=(),
        mlp_norm=(),
        attn_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
        qk_norm="full",
    ),
)
_EXPERTS = "a mixture of experts has no student of one MLP"

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        _GPT2,
        CopySpec(
            stacked("attn.c_attn"),
            out="attn.c_proj",
            **_GPT2_COPY,
        ),
    ),
    "gpt_neox": Family(
        Layout(
            "gpt_neox.layers",
            "attention",
            "post_attention_layernorm",
            "gpt_neox.final_layer_norm",
            lambda config: config.use_parallel_residual,
        ),
        CopySpec(
            grouped("attention.query_key_value", lambda config: config.num_attention_heads),
            out="attention.dense",
            mlp_reads=plain("mlp.dense_h_to_4h"),
            down="mlp.dense_4h_to_h",
            embed="gpt_neox.embed_in",
        ),
    ),
    "opt": Family(
        Layout("model.decoder.layers", "self_attn", "final_layer_norm", "model.decoder.final_layer_norm"),
        CopySpec(
            _LLAMA_QKV,
            out="self_attn.out_proj",
            mlp_reads=plain("fc1"),
            down="fc2",
            attn_norm=("self_attn_layer_norm",),
            mlp_norm=("final_layer_norm",),
            embed="model.decoder.embed_tokens",
            positions="model.decoder.embed_positions",
            position_offset=2,
            refuses=_unless(_OPT_POST_NORM, _OPT_PROJECTED),
        ),
    ),
    "llama": Family(_LLAMA, _LLAMA_COPY),
    "mistral": Family(_LLAMA, _LLAMA_COPY),
    "qwen2": Family(_LLAMA, _LLAMA_COPY),
    "qwen3": Family(_LLAMA, CopySpec(_LLAMA_QKV, **_HEAD_NORMS)),
    "gemma": Family(_LLAMA, CopySpec(_LLAMA_QKV, gain_offset=1.0)),
    "gemma2": Family(_SANDWICH, CopySpec(_LLAMA_QKV, **_SANDWICH_COPY)),
    "gemma3_text": Family(_SANDWICH, CopySpec(_LLAMA_QKV, **_SANDWICH_COPY, **_HEAD_NORMS)),
    "olmo": Family(_LLAMA, CopySpec(_LLAMA_QKV, refuses=_unless(_CLIPPED))),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "smollm3": Family(_LLAMA, _LLAMA_COPY),
    "granite": Family(_LLAMA, _LLAMA_COPY),
    "arcee": Family(_LLAMA, CopySpec(_LLAMA_QKV, mlp_reads=plain("mlp.up_proj"))),
    "starcoder2": Family(_LLAMA, CopySpec(_LLAMA_QKV, mlp_reads=plain("mlp.c_fc"), down="mlp.c_proj")),
    "phi3": Family(_LLAMA, CopySpec(stacked("self_attn.qkv_proj"), mlp_reads=fused_gate)),
    "stablelm": Family(
        Layout(mid="post_attention_layernorm", is_parallel=lambda config: config.use_parallel_residual),
        CopySpec(
            _LLAMA_QKV,
            mlp_norm=("post_attention_layernorm", "input_layernorm"),
            refuses=_unless(_QK_LAYER_NORM),
        ),
    ),
    "phi": Family(
        Layout(mid="mlp", final_norm="model.final_layernorm", is_parallel=lambda config: True),
        CopySpec(
            _LLAMA_QKV,
            out="self_attn.dense",
            mlp_norm=("input_layernorm",),
            mlp_reads=plain("mlp.fc1"),
            down="mlp.fc2",
            refuses=_unless(_QK_LAYER_NORM),
        ),
    ),
    "gptj": Family(
        Layout("transformer.h", "attn", "mlp", "transformer.ln_f", lambda config: True),
        CopySpec(
            separate("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            out="attn.out_proj",
            mlp_reads=plain("mlp.fc_in"),
            down="mlp.fc_out",
            attn_norm=("ln_1",),
            mlp_norm=("ln_1",),
            embed="transformer.wte",
            interleaved_rope=True,
        ),
    ),
    "falcon": Family(
        Layout(
            "transformer.h",
            "self_attention",
            "post_attention_layernorm",
            "transformer.ln_f",
            lambda config: config.parallel_attn or config.new_decoder_architecture,
        ),
        CopySpec(
            grouped("self_attention.query_key_value", falcon_kv_heads),
            out="self_attention.dense",
            mlp_reads=plain("mlp.dense_h_to_4h"),
            down="mlp.dense_4h_to_h",
            attn_norm=("ln_attn", "input_layernorm"),
            mlp_norm=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
            embed="transformer.word_embeddings",
            refuses=_unless(_ALIBI),
        ),
    ),
    "cohere": Family(
        _ALWAYS_PARALLEL,
        CopySpec(
            _LLAMA_QKV,
            mlp_norm=("input_layernorm",),
            interleaved_rope=True,
            refuses=_unless(_QK_LAYER_NORM),
        ),
    ),
    "gpt_bigcode": Family(
        _GPT2,
        CopySpec(
            bigcode_qkv,
            out="attn.c_proj",
            **_GPT2_COPY,
        ),
    ),
    "gpt_neo": Family(
        _GPT2,
        CopySpec(
            separate("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
            out="attn.attention.out_proj",
            **_GPT2_COPY,
            attention_scale=1.0,
        ),
    ),
    "nemotron": Family(_LLAMA, CopySpec(_LLAMA_QKV, mlp_reads=plain("mlp.up_proj"), gain_offset=1.0)),
    "glm": Family(_LLAMA, CopySpec(_LLAMA_QKV, mlp_reads=fused_gate, interleaved_rope=True)),
    "codegen": Family(
        Layout("transformer.h", "attn", "mlp", "transformer.ln_f", lambda config: True),
        no_copy="its fused projection is laid out for four accelerators and not read",
    ),
    "mixtral": Family(_LLAMA, no_copy=_EXPERTS),
    "qwen2_moe": Family(_LLAMA, no_copy=_EXPERTS),
    "qwen3_moe": Family(_LLAMA, no_copy=_EXPERTS),
    "olmoe": Family(_LLAMA, no_copy=_EXPERTS),
    "gpt_oss": Family(_LLAMA, no_copy=_EXPERTS),
}


def check_family(model_type: str, allow_unlisted: bool = False) -> None:
    """Refuse a family that is not in the table, before anything of it is loaded.

    Raises:
        UnsupportedModelError: not listed, and not allowed to be tried.
    """
    if model_type not in FAMILIES and not allow_unlisted:
        raise UnsupportedModelError(
            f"model family '{model_type}' is not supported; supported: {', '.join(sorted(FAMILIES))} "
            "(dense.allow_unlisted true tries it, if its blocks have the standard shape)"
        )


def family_of(model: PreTrainedModel, allow_unlisted: bool = False) -> Family:
    """The model's family; for an unlisted one a guess, which still has to pass the self-check.

    Raises:
        UnsupportedModelError: not listed and not allowed, or not of the standard shape.
    """
    model_type = model.config.model_type
    check_family(model_type, allow_unlisted)
    return FAMILIES.get(model_type) or Family(_guess(model), no_copy="an unlisted family is not copied")


def _guess(model: PreTrainedModel) -> Layout:
    """The standard shape: a list of blocks with an attention and a norm before the MLP."""
    layers = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            names = [child for child, _ in module[0].named_children()]
            attention = _first(names, "self_attn", "attn", "attention", "self_attention")
            mid = _first(names, "pre_feedforward_layernorm", "post_attention_layernorm", "ln_2",
                         "ffn_norm", "feedforward_layernorm", "norm_2", "final_layer_norm")  # fmt: skip
            parent = name.rpartition(".")[0]
            siblings = [child for child, _ in model.get_submodule(parent).named_children()]
            final = _first(siblings, "norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f")
            if attention and mid and final:
                return Layout(name, attention, mid, f"{parent}.{final}")
    raise UnsupportedModelError(
        f"model family '{model.config.model_type}' is not listed and not of the standard shape: no list of "
        f"{layers} blocks that each hold an attention and a norm before the MLP"
    )


def _first(names: list[str], *wanted: str) -> str | None:
    return next((name for name in wanted if name in names), None)


def removes_mean(norm: nn.Module, width: int, device: torch.device) -> bool:
    """Whether a norm ignores the mean of the stream (LayerNorm) or not (RMSNorm): the norm is asked."""
    stream = torch.linspace(-1, 1, width, device=device)[None, None]
    with torch.no_grad():
        return torch.allclose(norm(stream + 1), norm(stream), atol=1e-4)
