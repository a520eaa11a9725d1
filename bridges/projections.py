"""Where a dense block's projections are, whatever module or matrix they share: readers for `CopySpec`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Affine = tuple[Tensor, Tensor | None]  # weight (out, in) and bias
Qkv = Callable[[nn.Module, Any], tuple[Affine, Affine, Affine]]  # block, config -> q, k, v
MlpReads = Callable[[nn.Module], tuple[Affine | None, Affine]]  # block -> gate or None, up


def first_of(block: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The first of these modules that the block has."""
    return next(module for name in names if (module := getattr(block, name, None)) is not None)


def affine(module: nn.Module) -> Affine:
    """Weight (out, in) and bias of a linear module; GPT-2's Conv1D keeps (in, out)."""
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
    return weight, module.bias


def separate(*names: str) -> Qkv:
    return lambda block, config: tuple(affine(block.get_submodule(name)) for name in names)


def stacked(name: str) -> Qkv:
    """[all queries | all keys | all values], keys and values possibly of fewer heads."""

    def split(block: nn.Module, config: Any) -> tuple[Affine, Affine, Affine]:
        weight, bias = affine(block.get_submodule(name))
        heads, kv_heads = config.num_attention_heads, _kv_heads(config)
        head_dim = len(weight) // (heads + 2 * kv_heads)
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        biases = bias.split(sizes) if bias is not None else (None, None, None)
        return tuple(zip(weight.split(sizes), biases, strict=True))

    return split


def grouped(name: str, kv_heads: Callable[[Any], int]) -> Qkv:
    """Per key/value head: [its queries | key | value]."""

    def split(block: nn.Module, config: Any) -> tuple[Affine, Affine, Affine]:
        weight, bias = affine(block.get_submodule(name))
        groups = kv_heads(config)
        head_dim = len(weight) // (config.num_attention_heads + 2 * groups)

        def parts(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            grouped = rows.unflatten(0, (groups, -1, head_dim))  # (group, head of the group, d_head, ...)
            return tuple(x.flatten(0, 2) for x in (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]))

        biases = parts(bias) if bias is not None else (None, None, None)
        return tuple(zip(parts(weight), biases, strict=True))

    return split


def plain(name: str) -> MlpReads:
    """No gate."""
    return lambda block: (None, affine(block.get_submodule(name)))


def fused_gate(block: nn.Module) -> tuple[Affine, Affine]:
    """[gate | up] in one matrix."""
    weight, bias = affine(block.mlp.gate_up_proj)
    gate, up = weight.chunk(2)
    gate_bias, up_bias = bias.chunk(2) if bias is not None else (None, None)
    return (gate, gate_bias), (up, up_bias)


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def falcon_kv_heads(config: Any) -> int:
    is_shared = config.multi_query and not config.new_decoder_architecture
    return 1 if is_shared else config.num_kv_heads


def bigcode_qkv(block: nn.Module, config: Any) -> tuple[Affine, Affine, Affine]:
    """With one shared key and value [queries | key | value], else [query | key | value] per head."""
    if config.multi_query:
        return grouped("attn.c_attn", lambda config: 1)(block, config)
    return grouped("attn.c_attn", lambda config: config.num_attention_heads)(block, config)
