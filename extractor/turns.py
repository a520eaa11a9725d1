"""Turns of a student's free bases: which are free, and how they are applied without changing the function.

A student's matrices are looked at as rows in the stream's basis: a read's weight as it is, a write's
transposed, an embedding's table. The stream x -> x Q turns them all, rows -> rows Q. Inside the heads, q
and k may be turned together, and v with the columns of o; these turn the outputs: rows -> G^T rows per
head. With grouped-query attention a key/value head and the query heads of its group share one turn.

- The stream is free if every read is behind an RMSNorm without gain (`pre_norm`) and no gain sits on its
  side (`post_norm`).
- q and k are free if nothing between them and their dot product knows a basis: no rope, no q/k norm.
- v and o are always free.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from extractor.student import Student
from extractor.student_config import StudentConfig

HeadTurns = Float[Tensor, "layer kv_head d_head d_head"]


@dataclass(frozen=True)
class Turns:
    """Orthogonal maps in float64; None where the basis is not free."""

    stream: Float[Tensor, "d_sparse d_sparse"] | None
    qk: HeadTurns | None
    vo: HeadTurns

    def of_heads(self, matrix: "Matrix") -> Float[Tensor, "kv_head d_head d_head"] | None:
        """What turns the rows of this matrix head by head."""
        of_kind = {"qk": self.qk, "vo": self.vo, None: None}[matrix.heads]
        return None if of_kind is None else of_kind[matrix.layer]

    def to(self, device: torch.device) -> "Turns":
        stream, qk = (None if turn is None else turn.to(device) for turn in (self.stream, self.qk))
        return Turns(stream, qk, self.vo.to(device))


class Matrix(NamedTuple):
    """A matrix that reads or writes the residual stream, and which of the heads' turns concern it."""

    module: nn.Linear | nn.Embedding
    is_write: bool = False
    heads: str | None = None  # "qk", "vo" or None
    layer: int = 0

    def rows(self) -> Float[Tensor, "row d_sparse"]:
        """A view of the weight with rows in the stream's basis."""
        weight = self.module.weight.detach()
        return weight.T if self.is_write else weight


def identity_turns(config: StudentConfig) -> Turns:
    """Turns of the free bases that change nothing."""
    heads = torch.eye(config.head_dim, dtype=torch.float64).expand(
        config.num_hidden_layers, config.num_key_value_heads, -1, -1
    )
    is_stream_free = config.pre_norm and not config.post_norm
    stream = torch.eye(config.hidden_size, dtype=torch.float64) if is_stream_free else None
    is_qk_free = not any(config.rope_layers) and config.qk_norm is None
    return Turns(stream, heads.clone() if is_qk_free else None, heads.clone())


def stream_matrices(student: Student) -> Iterator[Matrix]:
    """Every matrix that reads or writes the stream."""
    for table in (student.embed_tokens, student.embed_positions, student.lm_head):
        if table is not None:
            yield Matrix(table)
    for number, layer in enumerate(student.layers):
        yield from attention_matrices(student, number, "qk")
        yield from attention_matrices(student, number, "vo")
        yield Matrix(layer.mlp.up_proj)
        if layer.mlp.gate_proj is not None:
            yield Matrix(layer.mlp.gate_proj)
        yield Matrix(layer.mlp.down_proj, is_write=True)


def attention_matrices(student: Student, layer: int, heads: str) -> tuple[Matrix, Matrix]:
    """A layer's q and k, or v and o."""
    attn = student.layers[layer].attn
    if heads == "qk":
        return Matrix(attn.q_proj, False, heads, layer), Matrix(attn.k_proj, False, heads, layer)
    return Matrix(attn.v_proj, False, heads, layer), Matrix(attn.o_proj, True, heads, layer)


def turn_heads(
    rows: Float[Tensor, "row channel"], turns: Float[Tensor, "kv_head d_head d_head"] | None
) -> Float[Tensor, "row channel"]:
    """Rows of all heads, turned within each head; neighbouring heads of a group share their turn."""
    if turns is None:
        return rows
    kv_heads, d_head, _ = turns.shape
    heads = rows.unflatten(0, (kv_heads, -1, d_head))  # (kv_head, head of its group, d_head, channel)
    return (turns.mT[:, None] @ heads).flatten(0, 2)


@torch.no_grad()
def apply_turns_(student: Student, turns: Turns) -> None:
    """Turn the student's weights in place, in float64; its function stays."""
    turns = turns.to(student.embed_tokens.weight.device)
    for matrix in stream_matrices(student):
        head_turns = turns.of_heads(matrix)
        rows = turn_heads(matrix.rows().double(), head_turns)
        rows = rows if turns.stream is None else rows @ turns.stream
        matrix.rows().copy_(rows)
        if matrix.is_write and turns.stream is not None:
            bias = matrix.module.bias
            bias.copy_(bias.double() @ turns.stream)
        elif not matrix.is_write and head_turns is not None:
            bias = matrix.module.bias
            bias.copy_(turn_heads(bias.double()[:, None], head_turns)[:, 0])


# --- turns as a file -------------------------------------------------------------------------------------


def save_turns(path: Path, turns: Turns) -> None:
    """Write a whole file or nothing; processes of one run may do so at the same time."""
    tensors = {name: turn.contiguous() for name, turn in vars(turns).items() if turn is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        save_file(tensors, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_turns(path: Path, config: StudentConfig) -> Turns | None:
    """Turns for such a student; None without a file, or with one that would change the function."""
    wanted = vars(identity_turns(config))
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return None
    if tensors.keys() != {name for name, turn in wanted.items() if turn is not None}:
        return None
    for name, turn in tensors.items():
        if turn.shape != wanted[name].shape or turn.dtype != torch.float64:
            return None
        if not deviation(turn) < 1e-9:  # also where it is NaN
            return None
    return Turns(**{name: tensors.get(name) for name in wanted})


def deviation(turn: Float[Tensor, "*group d d"]) -> float:
    """How far from orthogonal: max |Q^T Q - I|."""
    return (turn.mT @ turn - torch.eye(turn.shape[-1]).to(turn)).abs().max().item()
