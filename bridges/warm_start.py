"""A student that starts as an exact copy of the dense model (our own step beyond the paper).

1. Centre what writes to the residual stream where norms remove the mean anyway (LayerNorm): on a centred
   stream a LayerNorm is an RMSNorm.
2. Fold each norm's scale and bias into the matrices that read it, and every constant of a family
   (embedding, residual, attention and logit multipliers) into the matrix beside it.
3. Turn the bases (`extractor.rotation`), then widen (`extractor.widen`).

Gains of q/k norms and post-norms cannot be folded, because a norm follows the matrix: the student keeps
them. The bridges start as the same turn and its inverse, so at density 1 everything is exact.
"""

import copy
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from bridges.bridge import BridgeSet
from bridges.dense import DenseModel
from bridges.families import CopySpec, Family
from bridges.projections import Affine, affine, first_of
from extractor.config import Config
from extractor.errors import UnsupportedModelError
from extractor.rotation import RotationConfig, rotate_
from extractor.student import Student
from extractor.student_config import StudentConfig
from extractor.widen import widen

Norm = tuple[Tensor, Tensor | None]  # gain and shift


@runtime_checkable  # for beartype, in tests
class Anatomy(Protocol):
    """What of a dense model decides its student's config; its weights may be on the meta device."""

    model: PreTrainedModel
    family: Family
    config: Any
    blocks: nn.ModuleList
    final_norm: nn.Module
    is_parallel: bool

    @property
    def width(self) -> int: ...


class StudentShape(Config):
    """The student's shape and options; widths of 0 mean the dense model's own."""

    start: str = Field("copy", pattern="^(copy|random)$")
    """`copy`: exact copy of the dense model; `random`: random weights, as the paper."""
    hidden_size: int = Field(0, ge=0)
    intermediate_size: int = Field(0, ge=0)
    num_attention_heads: int = Field(0, ge=0)
    """With grouped-query attention in whole groups."""
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
        UnsupportedModelError: a family, or an option of one, that no exact copy is known for.
    """
    turn = torch.eye(dense.width)
    if shape.start == "copy":
        student = copy_dense(dense, **_options(shape))
        cache_key = dense.sha256 if dense.sha256 != "none" else None
        turn = rotate_(student, rotation, cache_key=cache_key, show_progress=show_progress)
        student = widen(
            student,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_attention_heads=shape.num_attention_heads,
        )
    else:
        student = Student(start_config(dense, shape))
    extra = student.config.hidden_size - dense.width  # below zero for a narrower random student
    frame = torch.nn.functional.pad(turn, (0, extra))  # (d_dense, d_sparse): turned, zero-padded
    bridges = BridgeSet.from_frame(
        frame,
        dense.sites,
        removes_mean=dense.removes_mean,
        reads_are_normed=student.config.pre_norm,
    )
    return student.eval(), bridges


def start_config(dense: Anatomy, shape: StudentShape) -> StudentConfig:
    """The config that `make_student` starts from: a copy's before it is widened.

    Raises:
        UnsupportedModelError: a copy of a family, or of an option of one, that none is known for.
    """
    if shape.start == "copy":
        return _copied_config(dense, _copy_spec(dense), _options(shape))
    return _random_config(dense, shape)


def _options(shape: StudentShape) -> dict[str, bool]:
    return {"attention_sink": shape.attention_sink, "bigram_table": shape.bigram_table}


@torch.no_grad()
def copy_dense(dense: DenseModel, **options: bool) -> Student:
    """A student of the dense model's own width that computes the same function.

    Raises:
        UnsupportedModelError: no exact copy is known for this family, or for an option it uses.
    """
    spec = _copy_spec(dense)
    student = Student(_copied_config(dense, spec, options))
    _Copier(dense, spec, student).run()
    return student


def _copy_spec(dense: Anatomy) -> CopySpec:
    name, way_out = dense.config.model_type, "student.start random gives it a student from random weights"
    if dense.family.copy is None:
        raise UnsupportedModelError(f"no exact copy is known for '{name}': {dense.family.no_copy}; {way_out}")
    if option := dense.family.copy.refuses(dense.config):
        raise UnsupportedModelError(f"no exact copy is known for '{name}' with {option}; {way_out}")
    return dense.family.copy


def _copied_config(dense: Anatomy, spec: CopySpec, options: dict[str, bool]) -> StudentConfig:
    """Sizes from the weights themselves, options from the Hugging Face config."""
    config, block = dense.config, dense.blocks[0]
    heads = config.num_attention_heads
    (q, _), (k, _), _ = spec.qkv(block, config)
    head_dim = len(q) // heads
    gate, up = spec.mlp_reads(block)
    norms = [first_of(block, names) for names in (spec.attn_norm, spec.mlp_norm) if names]
    post_norms = [name for name in (spec.attn_post_norm, spec.mlp_post_norm) if name is not None]
    norms += [block.get_submodule(name) for name in post_norms]
    if len({_eps(norm) for norm in [*norms, dense.final_norm]}) > 1:
        raise UnsupportedModelError(f"'{config.model_type}' with norms of different eps is not copied")
    return StudentConfig(
        vocab_size=dense.model.get_output_embeddings().weight.shape[0],
        hidden_size=dense.width,
        num_hidden_layers=len(dense.blocks),
        num_attention_heads=heads,
        num_key_value_heads=len(k) // head_dim,
        head_dim=head_dim,
        intermediate_size=len(up[0]),
        hidden_act=_activation(config),
        gated_mlp=gate is not None,
        parallel_residual=dense.is_parallel,
        pre_norm=bool(spec.attn_norm),
        post_norm=spec.attn_post_norm is not None,
        qk_norm=spec.qk_norm,
        rms_norm_eps=_eps(dense.final_norm),
        qk_norm_eps=_eps(block.get_submodule(spec.q_norm)) if spec.q_norm else 1e-6,
        attn_logit_softcapping=getattr(config, "attn_logit_softcapping", None),
        final_logit_softcapping=getattr(config, "final_logit_softcapping", None),
        **_positions(dense, spec, head_dim),
        **_windows(config),
        **options,
        **_token_ids(config),
    )


def _random_config(dense: Anatomy, shape: StudentShape) -> StudentConfig:
    """The paper's kind of student in the dense model's size: learned positions, one MLP, no gates."""
    config = dense.config
    heads = config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return StudentConfig(
        vocab_size=dense.model.get_output_embeddings().weight.shape[0],
        hidden_size=shape.hidden_size or dense.width,
        num_hidden_layers=len(dense.blocks),
        num_attention_heads=shape.num_attention_heads or heads,
        head_dim=getattr(config, "head_dim", None) or dense.width // heads,
        intermediate_size=shape.intermediate_size or (inner if isinstance(inner, int) else 4 * dense.width),
        max_position_embeddings=config.max_position_embeddings,
        parallel_residual=dense.is_parallel,
        attention_sink=shape.attention_sink,
        bigram_table=shape.bigram_table,
        **_token_ids(config),
    )


def _token_ids(config: Any) -> dict[str, object]:
    return {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _eps(norm: nn.Module) -> float:
    """torch and transformers name it differently; OLMo's norm without weights fixes it at 1e-5."""
    return getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 1e-5)


def _activation(config: Any) -> str:
    # Gemma's `hidden_act` is a leftover; `hidden_activation` is what runs.
    for name in ("hidden_activation", "hidden_act", "activation_function", "activation"):
        if isinstance(value := getattr(config, name, None), str):
            return value
    raise UnsupportedModelError(f"'{config.model_type}': no activation function named in its config")


def _positions(dense: Anatomy, spec: CopySpec, head_dim: int) -> dict[str, object]:
    config = dense.config
    if spec.positions is not None:
        table = dense.model.get_submodule(spec.positions).weight
        return {"max_position_embeddings": len(table) - spec.position_offset}
    rope = copy.deepcopy(getattr(config, "rope_parameters", None))
    if rope is None:  # GPT-J: sinusoids over `rotary_dim` channels
        share = (config.rotary_dim or head_dim) / head_dim
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
    turned = getattr(config, "no_rope_layers", None)  # SmolLM3: 1 where a layer does use rotary positions
    return {
        "position_embedding_type": "rope",
        "rope_parameters": rope,
        "rope_layers": [bool(value) for value in turned] if turned else None,
        "max_position_embeddings": config.max_position_embeddings,
    }


def _windows(config: Any) -> dict[str, object]:
    if config.model_type == "gpt_neo":  # the same window, under other names
        kinds = {"global": "full_attention", "local": "sliding_attention"}
        types = [kinds[kind] for kind in config.attention_layers]
        return {"sliding_window": config.window_size, "layer_types": types}
    window = getattr(config, "sliding_window", None)
    if window is None:
        return {}
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return {"sliding_window": window, "layer_types": list(types)}


class _Copier:
    """Fills a student of the same width with the dense model's weights: centred and folded."""

    def __init__(self, dense: DenseModel, spec: CopySpec, student: Student):
        self.dense, self.spec, self.student = dense, spec, student
        self.config = dense.config
        self.centres = dense.removes_mean
        self.residual_scale = getattr(self.config, "residual_multiplier", 1.0)  # Granite

    def run(self) -> None:
        spec, student, model = self.spec, self.student, self.dense.model
        for layer, block in zip(student.layers, self.dense.blocks, strict=True):
            self._attention(layer.attn, block)
            self._mlp(layer.mlp, block)
        ids = torch.arange(student.config.vocab_size, device=self.dense.device)
        # Called, not read: Gemma's embedding scales what it looks up.
        embedded = model.get_submodule(spec.embed)(ids)
        self._fill(student.embed_tokens.weight, embedded * getattr(self.config, "embedding_multiplier", 1.0))
        if spec.positions is not None:
            table = model.get_submodule(spec.positions).weight[spec.position_offset :]
            self._fill(student.embed_positions.weight, table)
        weight, bias = affine(model.get_output_embeddings())
        scale = getattr(self.config, "logit_scale", 1.0) / getattr(self.config, "logits_scaling", 1.0)
        scaled = (weight * scale, bias * scale if bias is not None else None)
        self._read(student.lm_head, scaled, self._norm(self.dense.final_norm))

    def _attention(self, attn: nn.Module, block: nn.Module) -> None:
        spec, head_dim = self.spec, attn.head_dim
        norm = self._norm_at(block, spec.attn_norm)
        q, k, v = spec.qkv(block, self.config)
        if spec.interleaved_rope:
            q, k = (_uninterleaved(x, self.student.config) for x in (q, k))
        # The student divides by sqrt(d_head); any other scale goes into q.
        inner = getattr(block, self.dense.layout.attention)
        scale = spec.attention_scale or getattr(inner, "scaling", head_dim**-0.5)
        scale = scale * head_dim**0.5
        if spec.qk_norm is None:
            q = (q[0] * scale, q[1] * scale if q[1] is not None else None)
        else:
            for own, name, factor in (
                (attn.q_norm, spec.q_norm, scale),
                (attn.k_norm, spec.k_norm, 1.0),
            ):
                gain, _ = self._norm(block.get_submodule(name))
                own.weight.copy_(gain.repeat(len(own.weight) // len(gain)) * factor)
        for own, weights in ((attn.q_proj, q), (attn.k_proj, k), (attn.v_proj, v)):
            self._read(own, weights, norm)
        self._write(attn.o_proj, affine(block.get_submodule(spec.out)))
        self._post_norm(attn.post_norm, block, spec.attn_post_norm)

    def _mlp(self, mlp: nn.Module, block: nn.Module) -> None:
        norm = self._norm_at(block, self.spec.mlp_norm)
        gate, up = self.spec.mlp_reads(block)
        self._read(mlp.up_proj, up, norm)
        if gate is not None:
            self._read(mlp.gate_proj, gate, norm)
        self._write(mlp.down_proj, affine(block.get_submodule(self.spec.down)))
        self._post_norm(mlp.post_norm, block, self.spec.mlp_post_norm)

    def _norm_at(self, block: nn.Module, names: tuple[str, ...]) -> Norm | None:
        return self._norm(first_of(block, names)) if names else None

    def _norm(self, norm: nn.Module) -> Norm:
        """Gain and shift in double precision; OLMo's norm has neither."""
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        gain = torch.ones(self.dense.width) if weight is None else weight.cpu()
        return gain.double() + self.spec.gain_offset, None if bias is None else bias.cpu().double()

    def _post_norm(self, own: nn.Module, block: nn.Module, name: str | None) -> None:
        if name is not None:
            own.weight.copy_(self._norm(block.get_submodule(name))[0] * self.residual_scale)

    def _read(self, own: nn.Linear, weights: Affine, norm: Norm | None) -> None:
        weight, bias = (None if x is None else x.cpu().double() for x in weights)
        if bias is None:
            bias = torch.zeros(len(weight), dtype=weight.dtype)
        if norm is not None:
            gain, shift = norm
            bias = bias if shift is None else bias + weight @ shift
            weight = weight * gain
        # Centred too: the stream has no mean, so a read along it would only be weight to prune.
        own.weight.copy_(_centre(weight, dim=1) if self.centres else weight)
        own.bias.copy_(bias)

    def _write(self, own: nn.Linear, weights: Affine) -> None:
        weight, bias = (None if x is None else x.cpu().double() * self.residual_scale for x in weights)
        own.weight.copy_(_centre(weight, dim=0) if self.centres else weight)
        own.bias.zero_()
        if bias is not None:
            own.bias.copy_(_centre(bias, dim=0) if self.centres else bias)

    def _fill(self, own: Tensor, table: Tensor) -> None:
        table = table.cpu().double()
        own.copy_(_centre(table, dim=1) if self.centres else table)


def _uninterleaved(weights: Affine, config: StudentConfig) -> Affine:
    """Rotary pairs of neighbouring channels moved half the rotary width apart, as the student turns them."""
    rotary = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    order = torch.cat(
        [
            torch.arange(0, rotary, 2),
            torch.arange(1, rotary, 2),
            torch.arange(rotary, config.head_dim),
        ]
    )

    def reorder(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else rows.unflatten(0, (-1, config.head_dim))[:, order].flatten(0, 1)

    return reorder(weights[0]), reorder(weights[1])


def _centre(matrix: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    return matrix - matrix.mean(dim, keepdim=True)
