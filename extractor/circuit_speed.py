"""What circuits cost: masks learned together, folded models, sparse products. Rows of the benchmark."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F

from extractor.circuit import keep_nodes
from extractor.clock import Ratio, Row, Times, Work, interleave, ratio
from extractor.compact import CompactStudent, node_widths
from extractor.masks import GateTap, Means, NodeMasks, live_channels, mean_activations
from extractor.prune import PruneConfig, Setting, extract_circuit, learn_masks, wanted_probability
from extractor.sites import Node
from extractor.student import Student, load_student
from extractor.student_config import StudentConfig
from extractor.tasks import TaskBatch, encode_pairs, make_pairs


def mask_rows(run: Path, task: str, device: torch.device, rounds: int) -> list[Row]:
    """Learning masks on a trained student: together and alone, folded and whole, and against attribution."""
    student, tokenizer = load_student(run / "student", device)
    config = PruneConfig()
    train, selection = (
        encode_pairs(make_pairs(task, tokenizer, split=split, count=count, seed=0), tokenizer).to(device)
        for split, count in (("train", config.train_pairs), ("selection", config.selection_pairs))
    )
    means = mean_activations(student, train.ids)
    student.requires_grad_(False)
    wanted = wanted_probability(student, train, config.target)
    settings = [Setting(train, wanted, selection, seed, config.size_coefs[0]) for seed in range(8)]
    whole = config.model_copy(update={"compact": False})
    batched = config.model_copy(update={"together": True})
    times = interleave(
        {
            "alone": lambda: learn_masks(student, settings[:1], means, config),
            "alone, not folded": lambda: learn_masks(student, settings[:1], means, whole),
            "together": lambda: learn_masks(student, settings, means, config),
            "in one batch": lambda: learn_masks(student, settings, means, batched),
            "extract": lambda: extract_circuit(student, task, train, selection, means, config, "none"),
            "attribution": lambda: _attribution(student, train, means),
        },
        rounds,
        device,
        warm_up=False,  # seconds each
    )
    return [
        Row("masks: 8 seeds together / one alone", ratio(times, "together", "alone")),
        Row("masks: 8 seeds in one batch / one alone", ratio(times, "in one batch", "alone")),
        Row("masks: 8 seeds together / one, not folded", ratio(times, "together", "alone, not folded")),
        Row("masks: folded / not folded", ratio(times, "alone", "alone, not folded")),
        Row("extraction / attribution (2 forwards, 1 backward)", ratio(times, "extract", "attribution")),
    ]


def _attribution(student: Student, train: TaskBatch, means: Means) -> None:
    """What edge attribution patching runs: both sides of every pair, and one backward over half of them."""
    masks = NodeMasks(means, [0])
    gates = torch.ones_like(masks.tau, requires_grad=True)
    with torch.no_grad():
        student(train.ids)
    half = train.select(torch.arange(len(train) // 4, device=train.ids.device))
    logits = student(half.ids, tap=GateTap(masks)(gates)).logits
    half.logit_difference(logits).sum().backward()


def compact_rows(device: torch.device, rounds: int) -> list[Row]:
    """A circuit as a model of its own against the masked student."""
    small = StudentConfig(
        hidden_size=512, num_attention_heads=32, head_dim=16, intermediate_size=2048, num_hidden_layers=4
    )
    wide = StudentConfig(
        hidden_size=2048, num_attention_heads=128, head_dim=16, intermediate_size=8192, num_hidden_layers=2
    )
    cases = (
        ("d 512, 3 % kept, 8 x 256 tokens", small, {}, 8),
        ("d 512 with AbsTopK 1/4, 3 % kept", small, {"activation_frac": 0.25}, 8),
        ("d 2048, 3 % kept, 2 x 256 tokens", wide, {}, 2),
    )
    rows = []
    for name, shape, options, batch in cases:
        student = Student(StudentConfig(**(shape.to_diff_dict() | options))).to(device).eval()
        ids = torch.randint(student.config.vocab_size, (batch, 256), device=device)
        means = mean_activations(student, ids)
        nodes = _some_nodes(student.config, 0.03)
        compact, tap = CompactStudent(student, live_channels(nodes), means), keep_nodes(nodes, means)
        last = torch.full((batch, 1), 255, device=device)
        works: dict[str, Work] = {
            "masked": lambda s=student, i=ids, t=tap, k=last: s(i, tap=t, logits_to_keep=k),
            "compact": lambda c=compact, i=ids, k=last: c(i, logits_to_keep=k),
            "masked, all logits": lambda s=student, i=ids, t=tap: s(i, tap=t),
            "compact, all logits": lambda c=compact, i=ids: c(i),
        }
        with torch.inference_mode():
            error = (compact(ids).logits - student(ids, tap=tap).logits).abs().max().item()
            times = interleave(works, rounds, device)
        rows.append(Row(f"masked / compact, {name}", ratio(times, "masked", "compact")))
        every = ratio(times, "masked, all logits", "compact, all logits")
        rows.append(Row(f"masked / compact, {name}, logits at every token", every))
        rows.append(Row(f"largest logit difference, {name}", Ratio(error, error, error)))
    return rows


def _some_nodes(config: StudentConfig, share: float) -> list[Node]:
    """So many nodes at every address; q, k and v in the first heads, as circuits use few heads."""
    rng = random.Random(0)
    nodes = []
    for address, width in node_widths(config).items():
        count = round(share * width)
        is_head = address.endswith((".q", ".k", ".v"))
        channels = range(count) if is_head else rng.sample(range(width), count)
        nodes += [Node(address, channel) for channel in channels]
    return nodes


def sparse_product_rows(device: torch.device, rounds: int, density: float) -> list[Row]:
    """torch's compressed rows against the dense product, 1024 x 4096 in fp32: one token, and 256."""
    weight = torch.randn(4096, 1024, device=device)
    weight *= torch.rand_like(weight) < density
    compressed = weight.to_sparse_csr()
    one, many = torch.randn(1, 1024, device=device), torch.randn(256, 1024, device=device)
    columns = many.T.contiguous()  # feature-major: five times as fast as F.linear(many, compressed)
    times: Times = interleave(
        {
            "dense, 1": lambda: F.linear(one, weight),
            "sparse, 1": lambda: F.linear(one, compressed),
            "dense, 256": lambda: F.linear(many, weight),
            "sparse, 256": lambda: compressed @ columns,
        },
        rounds,
        device,
    )
    return [
        Row("dense product / sparse one, 1 token", ratio(times, "dense, 1", "sparse, 1")),
        Row(
            "dense product / sparse one, 256 tokens",
            ratio(times, "dense, 256", "sparse, 256"),
        ),
    ]
