"""A wider student that computes the same function.

Extra residual channels, heads and neurons are read at random and written as zero: nothing changes, and
gradients reach them (read and written as zero, they would stay dead for ever). Norms take their mean over
more channels of which the extra ones are zero, so what they read shrinks: gains (or the reads they are
folded into) take sqrt(d / D), eps takes d / D.
"""

import torch
from torch import Tensor, nn

from extractor.errors import InputError
from extractor.layers import GainNorm
from extractor.student import Student
from extractor.student_config import StudentConfig


@torch.no_grad()
def widen(
    student: Student, *, hidden_size: int = 0, intermediate_size: int = 0, num_attention_heads: int = 0
) -> Student:
    """The same function in a student of these widths (0: as it is); the narrow one is left alone.

    Raises:
        InputError: a width below the student's own, or heads that do not fill whole groups.
    """
    old = student.config
    asked = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_attention_heads,
    }
    sizes = {name: size or getattr(old, name) for name, size in asked.items()}
    for name, size in sizes.items():
        if size < getattr(old, name):
            raise InputError(f"student.{name} is {size}; the dense model has {getattr(old, name)}")
    group = old.num_attention_heads // old.num_key_value_heads
    if sizes["num_attention_heads"] % group:
        raise InputError(
            f"student.num_attention_heads is {sizes['num_attention_heads']}; "
            f"{group} heads share a key and value here, so give a multiple of {group}"
        )
    if all(size == getattr(old, name) for name, size in sizes.items()):
        return student
    stream_ratio = old.hidden_size / sizes["hidden_size"]
    head_ratio = old.num_attention_heads / sizes["num_attention_heads"]
    values = {
        **old.to_dict(),
        **sizes,
        "num_key_value_heads": sizes["num_attention_heads"] // group,
        "rms_norm_eps": old.rms_norm_eps * stream_ratio,
        "qk_norm_eps": old.qk_norm_eps * (head_ratio if old.qk_norm == "full" else 1),
    }
    wide = Student(StudentConfig(**values))
    _fill(wide, student, stream_ratio**0.5, head_ratio**0.5)
    return wide.train(student.training)


def _fill(wide: Student, narrow: Student, stream_shrink: float, head_shrink: float) -> None:
    tables = ["embed_tokens"] + (["embed_positions"] if narrow.embed_positions is not None else [])
    for name in tables:
        _corner(getattr(wide, name).weight.zero_(), getattr(narrow, name).weight)
    if narrow.bigram is not None:
        wide.bigram.weight.copy_(narrow.bigram.weight)
    _read(wide.lm_head, narrow.lm_head, stream_shrink)
    read_shrink = stream_shrink if narrow.config.pre_norm else 1.0
    for new, old in zip(wide.layers, narrow.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            _read(getattr(new.attn, name), getattr(old.attn, name), read_shrink)
        if narrow.config.qk_norm == "full":  # extra channels must not count in the norm
            for name in ("q_proj", "k_proj"):
                getattr(new.attn, name).weight[len(getattr(old.attn, name).weight) :] = 0
        qk_shrink = head_shrink if narrow.config.qk_norm == "full" else 1.0
        _gain(new.attn.q_norm, old.attn.q_norm, qk_shrink)
        _gain(new.attn.k_norm, old.attn.k_norm, qk_shrink)
        _gain(new.attn.post_norm, old.attn.post_norm, stream_shrink)
        _gain(new.mlp.post_norm, old.mlp.post_norm, stream_shrink)
        if old.attn.sink is not None:
            _corner(new.attn.sink, old.attn.sink)
        _read(new.mlp.up_proj, old.mlp.up_proj, read_shrink)
        if old.mlp.gate_proj is not None:
            _read(new.mlp.gate_proj, old.mlp.gate_proj, read_shrink)
        _write(new.attn.o_proj, old.attn.o_proj)
        _write(new.mlp.down_proj, old.mlp.down_proj)


def _read(new: nn.Linear, old: nn.Linear, shrink: float) -> None:
    """Old rows read the old channels as before; what is new keeps its random start."""
    _corner(new.weight, old.weight * shrink)
    _corner(new.bias, old.bias)


def _write(new: nn.Linear, old: nn.Linear) -> None:
    _corner(new.weight.zero_(), old.weight)
    _corner(new.bias, old.bias)


def _gain(new: nn.Module, old: nn.Module, shrink: float) -> None:
    if isinstance(old, GainNorm):
        _corner(new.weight, old.weight * shrink)


def _corner(new: Tensor, old: Tensor) -> None:
    new[tuple(slice(size) for size in old.shape)] = old
