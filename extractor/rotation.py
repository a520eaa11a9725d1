"""Turn a student's free bases so that its matrices become sparse, without changing its function.

We look for the turns (`extractor.turns`) that minimise the L1 norm of the matrices, each scaled to unit
RMS, so that all count alike, on sampled rows:

1. stream: rows = every read row, write column and embedding row, one Q for all of them;
2. heads: one orthogonal map per key/value head for (q, k) and one for (v, o); then again from 1, going on
   from the turns found, `rounds` times.

Each step is Adam on the skew-symmetric gradient followed by the Cayley map, which stays orthogonal; no
matrix exponential. A step turns every plane at once, also in a wide stream: steps on blocks of channels
cost less each but do not find a basis whose directions are spread over all channels. All that is found is
applied once, so a start read from the cache is bit for bit the one that was searched for.
Related: DenoiseRotator (arXiv 2505.23049) learns rotations for compression.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import warnings
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from extractor.config import Config
from extractor.student import Student
from extractor.turns import (
    Turns,
    apply_turns_,
    attention_matrices,
    deviation,
    identity_turns,
    load_turns,
    save_turns,
    stream_matrices,
    turn_heads,
)

ALGORITHM = 2  # to be raised whenever the same config would find other turns


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
    learning_rate: float = Field(0.2, gt=0)
    """Largest turn of a step in radians per plane, times sqrt(width); falls linearly to zero."""
    cache: bool = True
    """Keep found turns below $SPARSEBRIDGE_CACHE (default ~/.cache/sparsebridge) for the next run."""
    seed: int = 0


def rotate_(
    student: Student, config: RotationConfig, cache_key: str | None = None, show_progress: bool = False
) -> Float[Tensor, "d_sparse d_sparse"]:
    """Turn the student's bases in place; returns Q, so that new stream = old stream @ Q.

    Args:
        cache_key: names the weights that the student starts from; none: nothing is cached.
    """
    identity = torch.eye(student.config.hidden_size)
    if not config.enabled:
        return identity
    path = cache_file(student, config, cache_key) if config.cache and cache_key is not None else None
    turns = load_turns(path, student.config) if path is not None else None
    if turns is None:
        turns = find_turns(student, config, show_progress)
        if path is not None:
            _try_to_save(path, turns)
    apply_turns_(student, turns)
    return identity if turns.stream is None else turns.stream.float()


def cache_file(student: Student, config: RotationConfig, cache_key: str) -> Path:
    """Where the turns for this start are kept: one file per weights, matrix shapes, config and algorithm."""
    shapes = {name: list(matrix.shape) for name, matrix in student.sparse_matrices().items()}
    identity = [ALGORITHM, cache_key, config.model_dump(mode="json", exclude={"cache"}), shapes]
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    root = os.environ.get("SPARSEBRIDGE_CACHE") or os.path.expanduser("~/.cache/sparsebridge")
    return Path(root) / "rotations" / f"{name}.safetensors"


def _try_to_save(path: Path, turns: Turns) -> None:
    try:
        save_turns(path, turns)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"found turns are not cached: '{path.parent}' ({error})", stacklevel=3)


def find_turns(student: Student, config: RotationConfig, show_progress: bool = False) -> Turns:
    """Search on the student's device; its weights stay as they are."""
    generator = torch.Generator().manual_seed(config.seed)
    turns = identity_turns(student.config)
    # With a fixed stream no basis depends on another, so one round says it all.
    for round_ in range(config.rounds if turns.stream is not None else 1):
        if turns.stream is not None:
            steps = config.stream_steps if round_ == 0 else config.stream_steps // 3
            rows = _stream_rows(student, turns)
            label = "rotate stream" if show_progress else None
            found = minimise_l1(rows, turns.stream[None], steps, config, generator, label)
            turns = dataclasses.replace(turns, stream=found[0])
        for heads in ("qk", "vo"):
            start = getattr(turns, heads)
            if start is None:
                continue
            rows = _head_rows(student, turns, heads)
            label = "rotate heads" if show_progress else None
            found = minimise_l1(rows, start.flatten(0, 1), config.head_steps, config, generator, label)
            turns = dataclasses.replace(turns, **{heads: found.view_as(start)})
    return turns


# --- the search ------------------------------------------------------------------------------------------


class StackedRows:
    """As many rows for each group, in one tensor."""

    def __init__(self, rows: Float[Tensor, "group row d"]):
        self.rows, self.device = rows, rows.device

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "group row d"]:
        total = self.rows.shape[1]
        if total <= count:
            return self.rows
        return self.rows[:, torch.randint(total, (count,), generator=generator).to(self.device)]


class ScatteredRows:
    """One group's rows, left in the matrices where they lie: together they may be as large as the model."""

    def __init__(self, matrices: list[Float[Tensor, "_ d"]]):
        self.matrices, self.device = matrices, matrices[0].device
        self.scales = [unit_rms(matrix) for matrix in matrices]
        self.ends = torch.tensor(list(itertools.accumulate(len(matrix) for matrix in matrices)))

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "1 row d"]:
        total = int(self.ends[-1])
        picks = torch.arange(total)
        if total > count:
            picks = torch.randint(total, (count,), generator=generator).sort().values
        splits = torch.searchsorted(picks, self.ends).tolist()  # picks below each matrix's end
        sampled = []
        for number, (start, stop) in enumerate(itertools.pairwise([0, *splits])):
            if start < stop:
                matrix = self.matrices[number]
                index = picks[start:stop] - (self.ends[number] - len(matrix))
                sampled.append(matrix[index.to(self.device)].float() * self.scales[number])
        return torch.cat(sampled)[None]


def minimise_l1(
    rows: StackedRows | ScatteredRows,
    start: Float[Tensor, "group d d"],
    steps: int,
    config: RotationConfig,
    generator: torch.Generator,
    label: str | None = None,
) -> Float[Tensor, "group d d"]:
    """Orthogonal Q per group (float64, orthogonal to 1e-12) that lowers mean |rows @ Q|."""
    width = start.shape[-1]
    q = start.to(rows.device, torch.float32)
    eye = torch.eye(width, device=rows.device)
    first, second = torch.zeros_like(q), torch.zeros_like(q)
    for step in tqdm(range(steps), desc=label, disable=label is None, leave=False, mininterval=2):
        turned = rows.sample(config.sampled_rows, generator) @ q
        # Gradient in q's own frame: q^T d|rows q|/dq, of which the skew part turns.
        skew = turned.mT @ turned.sign() / turned.shape[1]
        skew = skew - skew.mT
        first = 0.9 * first + 0.1 * skew
        second = 0.99 * second + 0.01 * skew.square()
        adam = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
        half = adam * (0.5 * config.learning_rate * (1 - step / steps) / width**0.5)
        q = q @ torch.linalg.solve(eye + half, eye - half)
    # Laid out as a file's tensors are: another layout would round other bits where it is applied.
    return nearest_orthogonal(q.double()).cpu().contiguous()


def nearest_orthogonal(q: Float[Tensor, "group d d"]) -> Float[Tensor, "group d d"]:
    """Polar factor of matrices that are nearly orthogonal: Newton-Schulz, two or three matmuls deep."""
    for _ in range(10):
        if deviation(q) < 1e-13:
            break
        q = 1.5 * q - 0.5 * q @ (q.mT @ q)
    return q


def _stream_rows(student: Student, turns: Turns) -> ScatteredRows:
    """Every matrix that reads or writes the stream; heads as turned so far, the stream as it was."""
    matrices = []
    for matrix in stream_matrices(student):
        head_turns = turns.of_heads(matrix)
        rows = matrix.rows()
        if head_turns is not None:
            rows = turn_heads(rows.float(), head_turns.to(rows.device, torch.float32))
        matrices.append(rows)
    return ScatteredRows(matrices)


def _head_rows(student: Student, turns: Turns, heads: str) -> StackedRows:
    """What each key/value head's turn acts on; the stream as turned so far, the heads as they were."""
    layers = []
    for layer in range(student.config.num_hidden_layers):
        blocks = []
        for matrix in attention_matrices(student, layer, heads):
            rows = matrix.rows().float()
            rows = rows * unit_rms(rows)
            if turns.stream is not None:
                rows = rows @ turns.stream.to(rows)
            by_head = rows.unflatten(0, (student.config.num_key_value_heads, -1, student.config.head_dim))
            blocks.append(by_head.mT.flatten(1, 2))  # (kv_head, head of its group * d_sparse, d_head)
        layers.append(torch.cat(blocks, dim=1))
    return StackedRows(torch.cat(layers))


def unit_rms(matrix: Float[Tensor, "row d"]) -> Float[Tensor, ""]:
    """The factor that gives a matrix unit RMS; turns do not change it. All-zero matrices stay zero."""
    rms = torch.linalg.vector_norm(matrix, dtype=torch.float32) / matrix.numel() ** 0.5
    return 1 / rms.clamp(min=torch.finfo(torch.float32).tiny)
