"""Memory of a training step on one process, in bytes, before any model exists.

What autograd keeps for the backward pass is asked of the real modules, run on fake tensors (shapes without
data). What is assumed beyond that:

- A dense block keeps what the student's layer keeps that is an exact copy of it.
- The sampled hybrid passes start at the first site: the worst case, which some step draws.
- Weights, gradients and both AdamW moments are fp32; several processes hold the gradients twice.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from bridges.bridge import Bridge, BridgeSet
from bridges.families import removes_mean
from bridges.losses import cross_entropy, kl_divergence, log_probs, normalised_mse
from bridges.skeleton import Skeleton, num_parameters
from bridges.warm_start import StudentShape
from extractor.layers import LayerContext, StudentLayer
from extractor.sites import no_tap
from extractor.student import Student, StudentConfig

FP32 = 4  # bytes
# Per weight of a block's matrices. bitsandbytes' 4-bit keeps an fp32 scale per 64 weights, its default.
QUANTISED_BYTES = {"none": FP32, "8bit": 1, "4bit": 0.5 + FP32 / 64}


def weights_memory(
    dense: Skeleton, student: Student, bridges: BridgeSet, quantization: str, num_processes: int
) -> dict[str, int]:
    trained = FP32 * (num_parameters(student) + num_parameters(bridges))
    matrices = sum(p.numel() for p in dense.blocks.parameters() if p.ndim >= 2)
    rest = num_parameters(dense.model) - matrices
    return {
        "dense model": int(QUANTISED_BYTES[quantization] * matrices) + FP32 * rest,
        "student and bridges": trained,
        "gradients": trained,
        "AdamW moments": 2 * trained,
        # DistributedDataParallel's default keeps its buckets beside the gradients
        "gradient buckets": trained if num_processes > 1 else 0,
    }


def step_memory(
    dense: Skeleton,
    config: StudentConfig,
    copied: StudentConfig,
    shape: StudentShape,
    hybrid: str,
    batch: tuple[int, int],
    bf16: bool,
) -> dict[str, int]:
    """What one forward pass leaves for the backward pass, by where it comes from."""
    tokens, layers = batch[0] * batch[1], len(dense.blocks)
    held = partial(_held_and_constant, batch=batch, bf16=bf16)
    student_layer, layer_casts = held(partial(_run_layer, config, trained=True))
    dense_layer, dense_layer_casts = held(partial(_run_layer, copied, trained=False))
    if shape.activation_frac is not None:  # AbsTopK keeps a mask of one byte per channel of every node
        student_layer += tokens * _node_channels(config)
    main_head, head_casts = held(partial(_run_head, config, trained=True, with_targets=True))
    student_head, _ = held(partial(_run_head, config, trained=True))
    dense_head, dense_head_casts = held(partial(_run_head, copied, trained=False))
    bridge, bridge_casts = held(partial(_run_bridge, dense.width, config.hidden_size))
    to_sparse, to_dense = layers * student_layer + student_head, layers * dense_layer + dense_head
    # all: passes are run again, one at a time; multi: two passes, at worst wholly in the heavier model
    heavier = max(to_sparse, to_dense)
    hybrid_kept = {"all": heavier, "multi": 2 * heavier}.get(hybrid, to_sparse + to_dense)
    # autocast makes its copies of trained weights once a step, those of frozen ones at every use
    student_casts, dense_casts = (
        layers * layer_casts + head_casts,
        layers * dense_layer_casts + dense_head_casts,
    )
    stream = FP32 * tokens * dense.width * len(dense.sites)
    logits = FP32 * tokens * config.vocab_size
    return {
        "weights cast to bf16": student_casts + dense_casts + len(dense.sites) * bridge_casts,
        "kept by the student's pass": layers * student_layer + main_head,
        "kept by the hybrid passes": hybrid_kept,
        "streams and bridges": stream * (2 if _removes_mean(dense) else 1) + len(dense.sites) * bridge,
        # the dense logits and log-probabilities; going back, the gradient before and after the softmax
        "dense logits": 2 * logits,
        "gradients of logits": 2 * logits,
    }


def _node_channels(config: StudentConfig) -> int:
    width = config.head_dim * (config.num_attention_heads + 2 * config.num_key_value_heads)
    return 4 * config.hidden_size + width + config.intermediate_size


def _removes_mean(dense: Skeleton) -> bool:
    """The norm itself is asked; with gains of one instead of the weights that are not there."""
    norm = copy.deepcopy(dense.final_norm).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.fill_(1)
    return removes_mean(norm, dense.width, torch.device("cpu"))


Run = Callable[[int, int], tuple[Callable[[], object], list[Tensor]]]


def _held_and_constant(run: Run, batch: tuple[int, int], bf16: bool) -> tuple[int, int]:
    """Bytes that grow with the batch and bytes that do not: weights cast to bf16."""
    size, length = batch
    once, twice = (_held(run, count * size, length, bf16) for count in (1, 2))
    return twice - once, 2 * once - twice if bf16 else 0  # in fp32 some scalars


def _held(run: Run, batch: int, length: int, bf16: bool) -> int:
    """Bytes that autograd keeps of a forward pass, on fake tensors; each storage once."""
    sizes: dict[int, int] = {}
    alive = []  # so that no storage's identity is given twice

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        forward, counted_elsewhere = run(batch, length)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            alive.append(forward())
        for tensor in counted_elsewhere:
            sizes.pop(tensor.untyped_storage()._cdata, None)
    return sum(sizes.values())


def _run_layer(config: StudentConfig, batch: int, length: int, *, trained: bool):
    # AbsTopK chooses by value, and there are none here
    layer = StudentLayer(_without_topk(config), 0).requires_grad_(trained)
    resid = torch.empty(batch, length, config.hidden_size, requires_grad=True)
    rope = None
    if any(config.rope_layers):
        rotary = int(config.head_dim * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))
        rope = (torch.empty(1, length, rotary), torch.empty(1, length, rotary))
    context = LayerContext(None, rope, None)
    return lambda: layer(resid, context, no_tap, False), list(layer.parameters())


def _without_topk(config: StudentConfig) -> StudentConfig:
    plain = copy.copy(config)
    plain.activation_frac = None
    return plain


def _run_head(config: StudentConfig, batch: int, length: int, *, trained: bool, with_targets: bool = False):
    head = nn.Linear(config.hidden_size, config.vocab_size).requires_grad_(trained)
    resid = torch.empty(batch, length, config.hidden_size, requires_grad=True)
    reference = torch.empty(batch, length, config.vocab_size)
    ids = torch.zeros(batch, length, dtype=torch.long)

    def forward() -> Tensor:
        own = log_probs(head(F.rms_norm(resid, resid.shape[-1:])))
        loss = kl_divergence(reference, own)
        return loss + cross_entropy(own, ids) if with_targets else loss

    return forward, [reference, *head.parameters()]


def _run_bridge(d_dense: int, d_sparse: int, batch: int, length: int):
    bridge = Bridge(d_dense, d_sparse)
    dense = torch.empty(batch, length, d_dense)
    sparse = torch.empty(batch, length, d_sparse, requires_grad=True)

    def forward() -> Tensor:
        encoded = normalised_mse(bridge.encode(dense), sparse, 1.0)
        return encoded + normalised_mse(bridge.decode(sparse), dense, 1.0)

    return forward, [dense, sparse, *bridge.parameters()]
