"""What the nodes of a circuit mean: where they are active, what they do, what they are joined to.

1. Contexts and labels: the whole student runs once over held-out text, and the circuit's nodes are recorded.
2. Effects: on held-out prompts, within the circuit, one node at a time is frozen at its mean. `total` is how
   far the answer difference (answer minus distractor, raw logits) falls; `direct` the same while every other
   sublayer writes what it wrote before, so what goes from the node's own write straight to the logits (the
   final norm's scale follows). Positive: the node helps. Intervals are clustered by template.
3. Names: weights in and out; for a channel of the stream, the tokens whose embedding has most of it and those
   whose logits it raises most, which AbsTopK and the norms do not change the sign of.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from extractor.circuit_graph import stream_links
from extractor.compact import CompactStudent
from extractor.masks import Means
from extractor.node_labels import label_nodes
from extractor.predicates import text_predicates
from extractor.sites import Node, Recorder, Tap
from extractor.statistics import mean_interval
from extractor.student import Student
from extractor.tasks import TaskBatch

if TYPE_CHECKING:
    from extractor.circuit import Circuit

TOKENS_BEFORE, TOKENS_AFTER = 16, 4
BLOCKS_AT_ONCE = 16


def describe_nodes(
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    circuit: "Circuit",
    means: Means,
    text: Int[Tensor, "block seq"],
    prompts: TaskBatch,
    seed: int,
    *,
    num_contexts: int = 5,
    num_tokens: int = 8,
) -> list[dict[str, object]]:
    """One JSON-able description per node, in forward order.

    Args:
        text: held-out blocks; half of them choose a label, half test it.
        prompts: held-out pairs, for the effects.
    """
    nodes, text = sorted(circuit.nodes, key=lambda n: n.sort_key), text.cpu()
    if not nodes:
        return []
    activations = record_nodes(student, nodes, text)
    labels = label_nodes(activations, text_predicates(text, tokenizer), seed)
    effects = node_effects(student, circuit, means, prompts)
    joined = _joined(circuit, student)
    return [
        {
            "node": str(node),
            "labels": labels[index],
            "activation": _summary(activations[..., index], means[node.address][node.channel]),
            "effect": {
                kind: mean_interval(values[:, index], prompts.cluster, seed=seed)
                for kind, values in effects.items()
            },
            **joined[node],
            **node_facts(student, tokenizer, node, num_tokens),
            "top": contexts(activations[..., index], text, tokenizer, num_contexts),
            "bottom": contexts(activations[..., index], text, tokenizer, num_contexts, lowest=True),
        }
        for index, node in enumerate(nodes)
    ]


@torch.no_grad()
def record_nodes(
    student: Student, nodes: Sequence[Node], text: Int[Tensor, "block seq"]
) -> Float[Tensor, "block seq node"]:
    """Activations of some nodes of the whole student over text, in the order given; float32 on the CPU."""
    columns = _columns(nodes)
    recorded = torch.empty(*text.shape, len(nodes))
    for start in range(0, len(text), BLOCKS_AT_ONCE):
        rows = slice(start, start + BLOCKS_AT_ONCE)

        def record(address: str, activation: Tensor, rows: slice = rows) -> Tensor:
            if address in columns:
                channels, places = columns[address]
                recorded[rows, :, places] = activation[..., channels].float().cpu()
            return activation

        student(text[rows].to(student.device), tap=record, logits_to_keep=1)
    return recorded


def _columns(nodes: Sequence[Node]) -> dict[str, tuple[list[int], list[int]]]:
    """By address: channels, and their places among the nodes."""
    columns: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for place, node in enumerate(nodes):
        columns[node.address][0].append(node.channel)
        columns[node.address][1].append(place)
    return dict(columns)


# --- effects ---------------------------------------------------------------------------------------------


@torch.no_grad()
def node_effects(
    student: Student, circuit: "Circuit", means: Means, prompts: TaskBatch
) -> dict[str, Float[Tensor, "example node"]]:
    """`direct` and `total` effect of every node (in forward order) on each example's answer difference."""
    model = circuit.compact(student, means)
    whole = Recorder()
    before = _difference(model, prompts, whole)
    direct, total = [], []
    for node in sorted(circuit.nodes, key=lambda n: n.sort_key):
        freeze = _freeze(model, node, means)
        total.append(before - _difference(model, prompts, freeze))
        direct.append(before - _difference(model, prompts, _hold_others(freeze, node, whole)))
    return {"direct": torch.stack(direct, dim=1).cpu(), "total": torch.stack(total, dim=1).cpu()}


def _difference(model: CompactStudent, prompts: TaskBatch, tap: Tap) -> Float[Tensor, " example"]:
    return prompts.logit_difference(model(prompts.ids, prompts.last[:, None], tap=tap).logits)


def _freeze(model: CompactStudent, node: Node, means: Means) -> Tap:
    """A tap of the compact model that holds one node at its mean."""
    column = int((model.live[node.address] == node.channel).nonzero())
    mean = means[node.address][node.channel]

    def tap(address: str, activation: Tensor) -> Tensor:
        if address != node.address:
            return activation
        return activation.index_fill(-1, torch.tensor([column], device=activation.device), float(mean))

    return tap


def _hold_others(freeze: Tap, node: Node, whole: Recorder) -> Tap:
    """`freeze`, while every sublayer but the node's own writes what it wrote before."""
    own = node.address.rpartition(".")[0]

    def tap(address: str, activation: Tensor) -> Tensor:
        sublayer, _, kind = address.rpartition(".")
        if kind == "resid_delta" and sublayer != own:
            return whole[address]
        return freeze(address, activation)

    return tap


# --- contexts --------------------------------------------------------------------------------------------


def contexts(
    activation: Float[Tensor, "block seq"],
    text: Int[Tensor, "block seq"],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    lowest: bool = False,
) -> list[dict[str, object]]:
    """Where a node is most (or least) active, at most once per block: the token and what is around it."""
    signed = -activation if lowest else activation
    peaks, positions = signed.max(dim=1)
    found = []
    for block in peaks.topk(min(count, len(text))).indices.tolist():
        position, ids = int(positions[block]), text[block].tolist()
        found.append(
            {
                "activation": float(activation[block, position]),
                "before": tokenizer.decode(ids[max(0, position - TOKENS_BEFORE) : position]),
                "token": tokenizer.decode(ids[position : position + 1]),
                "after": tokenizer.decode(ids[position + 1 : position + 1 + TOKENS_AFTER]),
                "block": block,
                "position": position,
            }
        )
    return found


def _summary(activation: Float[Tensor, "block seq"], mean: Float[Tensor, ""]) -> dict[str, float]:
    """`mean` is what the node is frozen at; the rest is over the held-out text."""
    return {
        "mean": float(mean),
        "std": float(activation.std()),
        "min": float(activation.min()),
        "max": float(activation.max()),
        "nonzero_share": float((activation != 0).float().mean()),
    }


# --- names -----------------------------------------------------------------------------------------------


def _joined(circuit: "Circuit", student: Student) -> dict[Node, dict[str, list[dict[str, object]]]]:
    """Weights in and out of every node, largest first; for a read its writers, for a write its readers."""
    into: dict[Node, list] = defaultdict(list)
    out: dict[Node, list] = defaultdict(list)
    for source, target, weight in sorted(circuit.edges, key=lambda edge: -abs(edge.weight)):
        into[target].append({"node": str(source), "weight": weight})
        out[source].append({"node": str(target), "weight": weight})
    written: dict[Node, list[str]] = defaultdict(list)
    read: dict[Node, list[str]] = defaultdict(list)
    for write, reader in stream_links(circuit.nodes, parallel_residual=student.config.parallel_residual):
        written[reader].append(str(write))
        read[write].append(str(reader))
    return {
        node: {
            "weights_in": into[node],
            "weights_out": out[node],
            "written_by": written[node],
            "read_by": read[node],
        }
        for node in circuit.nodes
    }


@torch.no_grad()
def node_facts(
    student: Student, tokenizer: PreTrainedTokenizerBase, node: Node, num_tokens: int
) -> dict[str, object]:
    """A node's bias; the head of a q, k or v channel; the tokens of a residual channel."""
    layer = student.layers[node.layer]
    linears = {
        "attn.q": layer.attn.q_proj,
        "attn.k": layer.attn.k_proj,
        "attn.v": layer.attn.v_proj,
        "attn.resid_delta": layer.attn.o_proj,
        "mlp.post_act": layer.mlp.up_proj,
        "mlp.resid_delta": layer.mlp.down_proj,
    }
    facts: dict[str, object] = {}
    if node.kind in linears:
        facts["bias"] = float(linears[node.kind].bias[node.channel])
    if node.kind in ("attn.q", "attn.k", "attn.v"):
        facts["head"] = node.channel // student.config.head_dim
    if node.kind.endswith(("act_in", "resid_delta")):
        facts["embedding"] = _extremes(student.embed_tokens.weight[:, node.channel], tokenizer, num_tokens)
        facts["unembedding"] = _extremes(student.lm_head.weight[:, node.channel], tokenizer, num_tokens)
    return facts


def _extremes(
    weights: Float[Tensor, " vocab"], tokenizer: PreTrainedTokenizerBase, count: int
) -> Mapping[str, object]:
    """The tokens with the largest positive and negative weights of a residual channel."""
    weights = weights.float().cpu()[: len(tokenizer)]  # a padded vocabulary has rows that no token has

    def named(order: Tensor) -> list[dict[str, object]]:
        return [{"token": tokenizer.decode([t]), "weight": float(weights[t])} for t in order.tolist()]

    largest, smallest = weights.topk(min(count, len(weights))), (-weights).topk(min(count, len(weights)))
    return {
        "most": named(largest.indices[largest.values > 0]),
        "least": named(smallest.indices[smallest.values > 0]),
        "nonzero": int(weights.count_nonzero()),
    }
