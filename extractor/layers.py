"""The student's sublayers: attention, MLP, and the block around one residual stream.

Every activation that is a node passes through the `tap`, in the order of `extractor.sites.NODE_KINDS`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb  # knows partial rotary

from extractor.machine import attend
from extractor.selection import abs_topk
from extractor.sites import Tap
from extractor.student_config import StudentConfig


class LayerContext(NamedTuple):
    """What a layer needs besides the stream: its mask, its rotation by position, the cache."""

    mask: Tensor | None
    rope: tuple[Tensor, Tensor] | None  # cos and sin, (1 or batch, seq, rotary channel)
    cache: Cache | None


class GainNorm(nn.Module):
    """RMSNorm over groups of neighbouring channels, with a gain: post-norms and q/k norms."""

    def __init__(self, width: int, group: int, eps: float):
        super().__init__()
        self.group, self.eps = group, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*batch channel"]) -> Float[Tensor, "*batch channel"]:
        grouped = x.unflatten(-1, (-1, self.group))
        return F.rms_norm(grouped, (self.group,), eps=self.eps).flatten(-2) * self.weight


class StudentAttention(nn.Module):
    """Causal attention with separate q, k, v matrices and AbsTopK at its nodes."""

    def __init__(self, config: StudentConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.frac = config.activation_frac
        self.softcap = config.attn_logit_softcapping
        self.group_size = config.num_attention_heads // config.num_key_value_heads
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width)
        self.k_proj = nn.Linear(config.hidden_size, kv_width)
        self.v_proj = nn.Linear(config.hidden_size, kv_width)
        self.o_proj = nn.Linear(width, config.hidden_size)
        self.q_norm, self.k_norm = (_qk_norm(config, size) for size in (width, kv_width))
        self.post_norm = _post_norm(config)
        self.sink = nn.Parameter(torch.zeros(config.num_attention_heads)) if config.attention_sink else None

    def forward(
        self, act_in: Float[Tensor, "batch seq d_sparse"], context: LayerContext, tap: Tap
    ) -> Float[Tensor, "batch seq d_sparse"]:
        prefix = f"{self.layer}.attn"
        # The nodes are what attention compares: after the q/k norms, before the turn by position.
        # AbsTopK over all heads together, as the paper's code does.
        q = tap(f"{prefix}.q", abs_topk(self.q_norm(self.q_proj(act_in)), self.frac))
        k = tap(f"{prefix}.k", abs_topk(self.k_norm(self.k_proj(act_in)), self.frac))
        v = tap(f"{prefix}.v", abs_topk(self.v_proj(act_in), self.frac))
        q, k, v = (self._split_heads(x) for x in (q, k, v))  # (batch, head, seq, d_head)
        if context.rope is not None:
            q, k = apply_rotary_pos_emb(q, k, *context.rope)
        if context.cache is not None:
            k, v = context.cache.update(k, v, self.layer)
        mixed = mix_heads(q, k, v, context.mask, self.group_size, self.sink, self.softcap)
        write = self.post_norm(self.o_proj(mixed))
        return tap(f"{prefix}.resid_delta", abs_topk(write, self.frac))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def mix_heads(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_head"],
    mask: Tensor | None,
    group_size: int,
    sink: Float[Tensor, " head"] | None,
    softcap: float | None,
) -> Float[Tensor, "batch query channel"]:
    """Attention of groups of query heads over their key/value head; the heads' outputs side by side."""
    k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
    if sink is not None:
        k, v, mask = _add_sink(sink, q, k, v, mask)
    return attend(causal_attention, q, k, v, mask, softcap).transpose(1, 2).flatten(2)


def _add_sink(
    sink: Float[Tensor, " head"], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One more key and value, both zero, whose logit is the head's sink."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    if mask is None:
        mask = _causal(queries, keys, q.device)
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    bias = bias.expand(batch, heads, queries, keys)
    column = sink.to(q.dtype)[None, :, None, None].expand(batch, heads, queries, 1)
    return F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), torch.cat([column, bias], dim=-1)


def causal_attention(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch head key d_head"],
    v: Float[Tensor, "batch head key d_head"],
    mask: Tensor | None,
    softcap: float | None,
) -> Float[Tensor, "batch head query d_head"]:
    """Attention under a mask (True: visible; float: added; None: causal), with an optional soft cap."""
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    if softcap is None:
        is_causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    scores = softcap * torch.tanh(q @ k.mT * q.shape[-1] ** -0.5 / softcap)
    if mask is None:
        mask = _causal(q.shape[2], k.shape[2], q.device)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1).nan_to_num(0) @ v  # a row of padding sees nothing


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return visible.tril(keys - queries)[None, None]  # (1, 1, query, key)


def _post_norm(config: StudentConfig) -> nn.Module:
    width = config.hidden_size
    return GainNorm(width, width, config.rms_norm_eps) if config.post_norm else nn.Identity()


def _qk_norm(config: StudentConfig, width: int) -> nn.Module:
    if config.qk_norm is None:
        return nn.Identity()
    group = config.head_dim if config.qk_norm == "head" else width
    return GainNorm(width, group, config.qk_norm_eps)


class StudentMLP(nn.Module):
    """Two or three matrices and an activation, with AbsTopK at neurons and writes."""

    def __init__(self, config: StudentConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.frac = config.activation_frac
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        is_gated = config.gated_mlp
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size) if is_gated else None
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.post_norm = _post_norm(config)

    def forward(
        self, act_in: Float[Tensor, "batch seq d_sparse"], tap: Tap
    ) -> Float[Tensor, "batch seq d_sparse"]:
        prefix = f"{self.layer}.mlp"
        up = self.up_proj(act_in)
        neurons = self.act(up) if self.gate_proj is None else self.act(self.gate_proj(act_in)) * up
        post_act = tap(f"{prefix}.post_act", abs_topk(neurons, self.frac))
        write = self.post_norm(self.down_proj(post_act))
        return tap(f"{prefix}.resid_delta", abs_topk(write, self.frac))


class StudentLayer(nn.Module):
    """Attention and MLP around one residual stream; runs from either of its sites."""

    def __init__(self, config: StudentConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.eps = config.rms_norm_eps if config.pre_norm else None
        self.is_parallel = config.parallel_residual
        self.frac = config.activation_frac
        self.attn = StudentAttention(config, layer)
        self.mlp = StudentMLP(config, layer)

    def forward(
        self,
        resid: Float[Tensor, "batch seq d_sparse"],
        context: LayerContext,
        tap: Tap,
        skip_attention: bool,
    ) -> Float[Tensor, "batch seq d_sparse"]:
        if self.is_parallel:
            resid = tap(f"{self.layer}.resid_pre", resid)
            return resid + self._attend(resid, context, tap) + self._think(resid, tap)
        if not skip_attention:
            resid = tap(f"{self.layer}.resid_pre", resid)
            resid = resid + self._attend(resid, context, tap)
        resid = tap(f"{self.layer}.resid_mid", resid)
        return resid + self._think(resid, tap)

    def _attend(self, resid: Tensor, context: LayerContext, tap: Tap) -> Tensor:
        return self.attn(tap(f"{self.layer}.attn.act_in", self._read(resid)), context, tap)

    def _think(self, resid: Tensor, tap: Tap) -> Tensor:
        return self.mlp(tap(f"{self.layer}.mlp.act_in", self._read(resid)), tap)

    def _read(self, resid: Tensor) -> Tensor:
        normed = resid if self.eps is None else F.rms_norm(resid, resid.shape[-1:], eps=self.eps)
        return abs_topk(normed, self.frac)
