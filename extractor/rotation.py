"""Turn a student's free bases so that its matrices become sparse, without changing its function.

With the norms' gains folded away, the residual stream may be turned by any orthogonal Q: reads
W -> W Q, writes W -> Q^T W, embeddings E -> E Q. Inside a head, q and k may be turned together, and
v with its columns of o. We look for the turns that minimise the L1 norm of the matrices (each scaled to
unit RMS, so that all count alike), on sampled rows:

1. stream: rows = every read row, write column and embedding row, one Q for all of them;
2. heads: one orthogonal map per head for (q, k) and one for (v, o); then again from 1, `rounds` times.

Each step is Adam on the skew-symmetric gradient followed by the Cayley map, which stays orthogonal; no
matrix exponential. Related: DenoiseRotator (arXiv 2505.23049) learns rotations for compression.
"""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from extractor.config import Config
from extractor.student import Student


class RotationConfig(Config):
    """How the start's free bases are chosen."""

    enabled: bool = True
    """False keeps the dense model's own basis."""
    stream_steps: int = Field(1000, ge=0)
    """Steps for the residual basis, in the first round (a third of it in later rounds)."""
    head_steps: int = Field(300, ge=0)
    """Steps for the bases inside the heads, per round."""
    rounds: int = Field(2, ge=1)
    sampled_rows: int = Field(4096, ge=1)
    """Rows looked at in a step."""
    learning_rate: float = Field(0.02, gt=0)
    """Largest turn of a step in radians per plane; falls linearly to zero."""
    seed: int = 0


def rotate_(
    student: Student, config: RotationConfig, show_progress: bool = False
) -> Float[Tensor, "d_sparse d_sparse"]:
    """Turn the student's bases in place; returns Q, so that new stream = old stream @ Q."""
    width = student.config.hidden_size
    total = torch.eye(width, dtype=torch.float64)
    if not config.enabled:
        return total.float()
    generator = torch.Generator().manual_seed(config.seed)
    for round_ in range(config.rounds):
        steps = config.stream_steps if round_ == 0 else config.stream_steps // 3
        rows = torch.cat([_unit_rms(m) for m in _stream_rows(student)])[None]
        turn = minimise_l1(rows, steps, config, generator, "rotate stream", show_progress)[0]
        turn_stream_(student, turn)
        total = total @ turn
        for blocks, apply in ((_qk_blocks, turn_qk_), (_vo_blocks, turn_vo_)):
            rows = blocks(student)
            turns = minimise_l1(rows, config.head_steps, config, generator, "rotate heads", show_progress)
            apply(student, turns)
    return total.float()


def minimise_l1(
    rows: Float[Tensor, "group row d"],
    steps: int,
    config: RotationConfig,
    generator: torch.Generator,
    label: str,
    show_progress: bool,
) -> Float[Tensor, "group d d"]:
    """Orthogonal Q per group (float64, orthogonal to 1e-12) that lowers mean |rows @ Q|."""
    groups, count, width = rows.shape
    q = torch.eye(width).expand(groups, width, width).clone()
    eye = torch.eye(width)
    first = torch.zeros_like(q)
    second = torch.zeros_like(q)
    for step in tqdm(range(steps), desc=label, disable=not show_progress, leave=False, mininterval=2):
        sample = rows
        if count > config.sampled_rows:
            sample = rows[:, torch.randint(count, (config.sampled_rows,), generator=generator)]
        gradient = sample.mT @ (sample @ q).sign() / sample.shape[1]
        skew = q.mT @ gradient
        skew = skew - skew.mT
        first = 0.9 * first + 0.1 * skew
        second = 0.99 * second + 0.01 * skew.square()
        adam = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
        half = adam * (0.5 * config.learning_rate * (1 - step / steps) / width**0.5)
        q = q @ torch.linalg.solve(eye + half, eye - half)
    u, _, vh = torch.linalg.svd(q.double())
    return u @ vh


# --- exact turns of a student's weights ------------------------------------------------------------------


@torch.no_grad()
def turn_stream_(student: Student, q: Float[Tensor, "d_sparse d_sparse"]) -> None:
    """Residual stream x -> x @ q: reads, writes and embeddings follow; the function stays."""
    for table in (student.embed_tokens, student.embed_positions, student.lm_head):
        table.weight.copy_(table.weight.double() @ q)
    for layer in student.layers:
        for read in (layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj, layer.mlp.up_proj):
            read.weight.copy_(read.weight.double() @ q)
        for write in (layer.attn.o_proj, layer.mlp.down_proj):
            write.weight.copy_(q.mT @ write.weight.double())
            write.bias.copy_(q.mT @ write.bias.double())


@torch.no_grad()
def turn_qk_(student: Student, turns: Float[Tensor, "layer_head d_head d_head"]) -> None:
    """Each head's q and k turned together: their dot products stay."""
    for layer, layer_turns in zip(student.layers, _by_layer(student, turns), strict=True):
        for read in (layer.attn.q_proj, layer.attn.k_proj):
            _turn_outputs_(read, layer_turns)


@torch.no_grad()
def turn_vo_(student: Student, turns: Float[Tensor, "layer_head d_head d_head"]) -> None:
    """Each head's v turned, and o's columns turned back."""
    for layer, layer_turns in zip(student.layers, _by_layer(student, turns), strict=True):
        _turn_outputs_(layer.attn.v_proj, layer_turns)
        heads = layer.attn.o_proj.weight.double().unflatten(1, layer_turns.shape[:2])
        turned = torch.einsum("ohi,hij->ohj", heads, layer_turns)
        layer.attn.o_proj.weight.copy_(turned.flatten(1))


def _turn_outputs_(linear: torch.nn.Linear, turns: Float[Tensor, "head d_head d_head"]) -> None:
    weight = linear.weight.double().unflatten(0, turns.shape[:2])  # (head, d_head, d_in)
    linear.weight.copy_((turns.mT @ weight).flatten(0, 1))
    bias = linear.bias.double().unflatten(0, turns.shape[:2])
    linear.bias.copy_(torch.einsum("hij,hi->hj", turns, bias).flatten())


def _by_layer(student: Student, turns: Tensor) -> Tensor:
    return turns.unflatten(0, (student.config.num_hidden_layers, -1))


# --- rows to be made sparse ------------------------------------------------------------------------------


def _stream_rows(student: Student) -> list[Float[Tensor, "row d_sparse"]]:
    """Every matrix that reads or writes the stream, as rows in the stream's basis."""
    tables = [student.embed_tokens, student.embed_positions, student.lm_head]
    rows = [table.weight.detach() for table in tables]
    for layer in student.layers:
        reads = (layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj, layer.mlp.up_proj)
        rows += [read.weight.detach() for read in reads]
        rows += [write.weight.detach().T for write in (layer.attn.o_proj, layer.mlp.down_proj)]
    return rows


def _qk_blocks(student: Student) -> Float[Tensor, "layer_head row d_head"]:
    return torch.cat(
        [
            torch.cat([_head_rows(layer.attn.q_proj, student), _head_rows(layer.attn.k_proj, student)], 1)
            for layer in student.layers
        ]
    )


def _vo_blocks(student: Student) -> Float[Tensor, "layer_head row d_head"]:
    blocks = []
    for layer in student.layers:
        write = _unit_rms(layer.attn.o_proj.weight.detach())  # (d_sparse, head * d_head)
        write = write.unflatten(1, (-1, student.config.head_dim)).transpose(0, 1)
        blocks.append(torch.cat([_head_rows(layer.attn.v_proj, student), write], 1))
    return torch.cat(blocks)


def _head_rows(linear: torch.nn.Linear, student: Student) -> Float[Tensor, "head d_sparse d_head"]:
    weight = _unit_rms(linear.weight.detach())
    return weight.unflatten(0, (-1, student.config.head_dim)).mT


def _unit_rms(matrix: Tensor) -> Tensor:
    return matrix / matrix.square().mean().sqrt()
