"""The sublayers of a compact circuit: small matrices between kept channels, constants for all others."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from extractor.layers import LayerContext, StudentAttention, StudentMLP, mix_heads
from extractor.masks import Live, Means
from extractor.sites import Tap
from extractor.sparsity import abs_topk


def is_ranked(frac: float | None) -> bool:
    """Whether AbsTopK ranks the channels of a node against each other."""
    return frac is not None and frac < 1


def frozen_means(means: Means, live: Live, address: str) -> Float[Tensor, " channel"]:
    """The means of an address, zero at its kept channels."""
    frozen = means[address].clone()
    frozen[live[address].to(frozen.device)] = 0
    return frozen


class Folded(nn.Module):
    """Some rows (None: all) of a matrix over some of its inputs; the frozen inputs are in the bias."""

    def __init__(self, linear: nn.Linear, rows: Tensor | None, columns: Tensor, frozen: Tensor):
        super().__init__()
        weight, bias = linear.weight.detach(), linear.bias.detach()
        if rows is not None:
            weight, bias = weight[rows], bias[rows]
        self.weight = nn.Parameter(weight[:, columns].contiguous(), requires_grad=False)
        self.bias = nn.Parameter(bias + weight @ frozen.to(weight), requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        return F.linear(x, self.weight, self.bias)


class _Sublayer(nn.Module):
    """Index buffers and kept channels of one sublayer."""

    def __init__(self, prefix: str, live: Live, names: tuple[str, ...], frac: float | None):
        super().__init__()
        self.prefix, self.frac = prefix, frac
        self.kept = {name: live[f"{prefix}.{name}"] for name in names}

    def index(self, name: str, index: Tensor | None) -> None:
        self.register_buffer(name, index, persistent=False)

    def rows(self, name: str, *, is_whole: bool) -> Tensor | None:
        """Rows to compute at a node: all (None) where the kept ones depend on the others; then `<name>_pick`
        holds which to keep."""
        is_whole = is_whole or is_ranked(self.frac)
        self.index(f"{name}_pick", self.kept[name] if is_whole else None)
        return None if is_whole else self.kept[name]

    def node(self, name: str, computed: Tensor, tap: Tap) -> Float[Tensor, "batch seq kept"]:
        """Kept channels of a node: ranked among all computed ones, cut down, through the tap."""
        chosen, ranked = getattr(self, f"{name}_pick"), abs_topk(computed, self.frac)
        return tap(f"{self.prefix}.{name}", pick(ranked, chosen))


class CompactAttention(_Sublayer):
    """Attention over the heads that hold a kept v channel."""

    def __init__(self, attn: StudentAttention, live: Live, means: Means):
        prefix = f"{attn.layer}.attn"
        super().__init__(prefix, live, ("act_in", "q", "k", "v", "resid_delta"), attn.frac)
        self.head_dim, self.group_size, self.softcap = attn.head_dim, attn.group_size, attn.softcap
        # With a sink the weights over keys do not sum to one, so a frozen v channel is no constant.
        through = torch.arange(attn.v_proj.out_features) if attn.sink is not None else self.kept["v"]
        kv_heads = (through // self.head_dim).unique()
        q_heads = (kv_heads[:, None] * self.group_size + torch.arange(self.group_size)).flatten()
        self.q_norm, self.k_norm, self.post_norm = attn.q_norm, attn.k_norm, attn.post_norm
        frozen = frozen_means(means, live, f"{prefix}.act_in")
        for name, heads in (("q", q_heads), ("k", kv_heads), ("v", kv_heads)):
            norm = getattr(self, f"{name}_norm", None)
            rows = self.rows(name, is_whole=norm is not None and not isinstance(norm, nn.Identity))
            folded = Folded(getattr(attn, f"{name}_proj"), rows, self.kept["act_in"], frozen)
            setattr(self, f"{name}_proj", folded)
            self._place(name, heads, frozen_means(means, live, f"{prefix}.{name}"))
        self._fold_output(attn, q_heads, through, frozen_means(means, live, f"{prefix}.v"))
        self.sink = None if attn.sink is None else nn.Parameter(attn.sink.detach()[q_heads])

    def _place(self, name: str, heads: Tensor, frozen: Tensor) -> None:
        """Where kept channels stand among the channels of the computed heads, and the others' means."""
        channels = _channels(heads, self.head_dim)
        self.index(f"{name}_from", torch.isin(self.kept[name], channels).nonzero()[:, 0])
        self.index(f"{name}_to", torch.isin(channels, self.kept[name]).nonzero()[:, 0])
        self.register_buffer(f"{name}_frozen", frozen[channels])

    def _fold_output(self, attn: StudentAttention, q_heads: Tensor, through: Tensor, frozen: Tensor) -> None:
        """Frozen v channels come through attention as they are, once per query head of their group."""
        computed = _channels(q_heads, self.head_dim)
        of_v = computed // self.head_dim // self.group_size * self.head_dim + computed % self.head_dim
        is_input = torch.isin(of_v, through)
        self.index("mixed_pick", None if is_input.all() else is_input.nonzero()[:, 0])
        self.index("o_channels", of_v[is_input])
        heads = frozen.unflatten(0, (-1, 1, self.head_dim)).expand(-1, self.group_size, -1)
        constant = heads.reshape(-1).clone()
        constant[computed[is_input]] = 0  # with a sink, frozen channels are inputs too
        rows = self.rows("resid_delta", is_whole=not isinstance(attn.post_norm, nn.Identity))
        self.o_proj = Folded(attn.o_proj, rows, computed[is_input], constant)

    def forward(
        self, act_in: Float[Tensor, "batch seq kept_in"], context: LayerContext, tap: Tap
    ) -> Float[Tensor, "batch seq kept_out"]:
        q = self._heads("q", self.node("q", self.q_norm(self.q_proj(act_in)), tap))
        k = self._heads("k", self.node("k", self.k_norm(self.k_proj(act_in)), tap))
        v = self._heads("v", self.node("v", self.v_proj(act_in), tap))
        mixed = self._mix(q, k, v, context) if q.shape[1] else act_in[..., :0]
        return self.node("resid_delta", self.post_norm(self.o_proj(mixed)), tap)

    def _heads(self, name: str, kept: Tensor) -> Float[Tensor, "batch head seq d_head"]:
        """All channels of the computed heads: the kept ones, and the others at their means."""
        frozen = getattr(self, f"{name}_frozen").to(kept.dtype).expand(*kept.shape[:2], -1)
        inside = pick(kept, getattr(self, f"{name}_from"))
        whole = frozen.index_copy(-1, getattr(self, f"{name}_to"), inside)
        return whole.unflatten(-1, (whole.shape[-1] // self.head_dim, self.head_dim)).transpose(1, 2)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, context: LayerContext) -> Tensor:
        if context.rope is not None:
            q, k = apply_rotary_pos_emb(q, k, *context.rope)
        mixed = mix_heads(q, k, v, context.mask, self.group_size, self.sink, self.softcap)
        return pick(mixed, self.mixed_pick)


class CompactMLP(_Sublayer):
    """The kept neurons between kept reads and kept writes."""

    def __init__(self, mlp: StudentMLP, live: Live, means: Means):
        prefix = f"{mlp.layer}.mlp"
        super().__init__(prefix, live, ("act_in", "post_act", "resid_delta"), mlp.frac)
        self.act, self.post_norm = mlp.act, mlp.post_norm
        frozen = frozen_means(means, live, f"{prefix}.act_in")
        rows = self.rows("post_act", is_whole=False)
        self.up_proj = Folded(mlp.up_proj, rows, self.kept["act_in"], frozen)
        is_gated = mlp.gate_proj is not None
        self.gate_proj = Folded(mlp.gate_proj, rows, self.kept["act_in"], frozen) if is_gated else None
        rows = self.rows("resid_delta", is_whole=not isinstance(mlp.post_norm, nn.Identity))
        frozen = frozen_means(means, live, f"{prefix}.post_act")
        self.down_proj = Folded(mlp.down_proj, rows, self.kept["post_act"], frozen)

    def forward(
        self, act_in: Float[Tensor, "batch seq kept_in"], tap: Tap
    ) -> Float[Tensor, "batch seq kept_out"]:
        up = self.up_proj(act_in)
        neurons = self.act(up) if self.gate_proj is None else self.act(self.gate_proj(act_in)) * up
        post_act = self.node("post_act", neurons, tap)
        return self.node("resid_delta", self.post_norm(self.down_proj(post_act)), tap)


def pick(x: Float[Tensor, "*batch channel"], index: Tensor | None) -> Float[Tensor, "*batch kept"]:
    """Some channels; None: all of them."""
    return x if index is None else x[..., index]


def _channels(heads: Tensor, head_dim: int) -> Int[Tensor, " channel"]:
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()
