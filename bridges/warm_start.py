"""A student that starts as an exact copy of the dense model (our own step beyond the paper).

1. Centre what writes to the residual stream (embeddings, output projections): LayerNorm removes the
   mean anyway, and on a centred stream it is an RMSNorm.
2. Fold each norm's scale and bias into the matrices that read it.
3. Widen with zeros: extra residual channels stay zero, so reads shrink by sqrt(d / D) and eps by d / D
   because the RMS is taken over more channels; extra neurons and heads write nothing.
4. Turn the bases (`extractor.rotation`).

The bridges start as the same turn and its inverse, so at density 1 everything is exact.
"""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.dense import DenseModel
from extractor.config import Config
from extractor.errors import InputError, UnsupportedModelError
from extractor.rotation import RotationConfig, rotate_
from extractor.student import Student, StudentConfig


class StudentShape(Config):
    """The student's shape and options; widths of 0 mean the dense model's own."""

    start: str = Field("copy", pattern="^(copy|random)$")
    """`copy`: exact copy of the dense model; `random`: random weights, as the paper."""
    hidden_size: int = Field(0, ge=0)
    intermediate_size: int = Field(0, ge=0)
    num_attention_heads: int = Field(0, ge=0)
    activation_frac: float | None = Field(None, gt=0, le=1)
    """AbsTopK: share of channels kept at every node at the end of annealing (the paper: 0.25, from
    the start); none switches it off."""
    attention_sink: bool = False
    """A learned logit per head for attending to nothing. The copy is then no longer exact."""
    bigram_table: bool = False
    """A learned table from the current token to the logits, zero at the start."""


def make_student(
    dense: DenseModel, shape: StudentShape, rotation: RotationConfig, show_progress: bool = False
) -> tuple[Student, BridgeSet]:
    """A student and its bridges, at density 1 and with AbsTopK off.

    Raises:
        InputError: a width below the dense model's.
        UnsupportedModelError: a GPT-2 option that the student does not have.
    """
    config = _student_config(dense, shape)
    student = Student(config)
    turn = torch.eye(config.hidden_size)
    if shape.start == "copy":
        _copy_gpt2_(student, dense)
        turn = rotate_(student, rotation, show_progress)
    frame = turn[: dense.config.hidden_size]  # (d_dense, d_sparse): zero-padded stream, turned
    bridges = BridgeSet.from_frame(frame, dense.sites, removes_mean=dense.family.removes_mean)
    return student.eval(), bridges


def _student_config(dense: DenseModel, shape: StudentShape) -> StudentConfig:
    source = dense.config
    if source.model_type != "gpt2":
        raise UnsupportedModelError(f"no exact copy is known for '{source.model_type}'")
    if source.scale_attn_by_inverse_layer_idx or not source.scale_attn_weights:
        raise UnsupportedModelError("GPT-2 with another attention scale than 1/sqrt(d_head)")
    own = {
        "hidden_size": source.n_embd,
        "intermediate_size": source.n_inner or 4 * source.n_embd,
        "num_attention_heads": source.n_head,
    }
    sizes = {}
    for name, least in own.items():
        sizes[name] = getattr(shape, name) or least
        if sizes[name] < least:
            raise InputError(f"student.{name} is {sizes[name]}; the dense model has {least}")
    ratio = source.n_embd / sizes["hidden_size"]
    return StudentConfig(
        **sizes,
        vocab_size=source.vocab_size,
        num_hidden_layers=source.n_layer,
        head_dim=source.n_embd // source.n_head,
        max_position_embeddings=source.n_positions,
        hidden_act=source.activation_function,
        rms_norm_eps=source.layer_norm_epsilon * ratio,
        attention_sink=shape.attention_sink,
        bigram_table=shape.bigram_table,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
    )


@torch.no_grad()
def _copy_gpt2_(student: Student, dense: DenseModel) -> None:
    """Fill the student with the dense model's weights: centred, folded, widened with zeros."""
    model = dense.model
    width = student.config.hidden_size
    shrink = (dense.config.n_embd / width) ** 0.5

    def read(linear: nn.Linear, weight: Tensor, bias: Tensor | None, norm: nn.LayerNorm) -> None:
        weight, gain, shift = weight.double(), norm.weight.double(), norm.bias.double()
        folded = weight @ shift if bias is None else weight @ shift + bias.double()
        # Centred too: the stream has no mean, so a read along it would only be weight to prune.
        _fill_(linear.weight, _centre(weight * gain, dim=1) * shrink)
        _fill_(linear.bias, folded)

    def write(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
        _fill_(linear.weight, _centre(weight.double(), dim=0))
        _fill_(linear.bias, _centre(bias.double(), dim=0))

    transformer = model.transformer
    _fill_(student.embed_tokens.weight, _centre(transformer.wte.weight.double(), dim=1))
    _fill_(student.embed_positions.weight, _centre(transformer.wpe.weight.double(), dim=1))
    for layer, block in zip(student.layers, transformer.h, strict=True):
        # Conv1D keeps (in, out); Linear keeps (out, in).
        qkv_weight = block.attn.c_attn.weight.T.chunk(3)
        qkv_bias = block.attn.c_attn.bias.chunk(3)
        projections = (layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj)
        for linear, weight, bias in zip(projections, qkv_weight, qkv_bias, strict=True):
            read(linear, weight, bias, block.ln_1)
        write(layer.attn.o_proj, block.attn.c_proj.weight.T, block.attn.c_proj.bias)
        read(layer.mlp.up_proj, block.mlp.c_fc.weight.T, block.mlp.c_fc.bias, block.ln_2)
        write(layer.mlp.down_proj, block.mlp.c_proj.weight.T, block.mlp.c_proj.bias)
    read(student.lm_head, model.lm_head.weight, None, transformer.ln_f)


def _centre(matrix: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    return matrix - matrix.mean(dim, keepdim=True)


def _fill_(target: Tensor, source: Tensor) -> None:
    """Copy into the leading corner; the rest is zero."""
    target.zero_()
    target[tuple(slice(size) for size in source.shape)] = source.to(target.dtype)
