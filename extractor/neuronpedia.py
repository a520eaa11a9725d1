"""Export of a circuit to Neuronpedia's graph JSON, as its schema 1.0.0 and circuit-tracer's files have it.

Source: apps/webapp/app/api/graph/graph-schema.json in hijohnnylin/neuronpedia, and graph_models.py in
decoderesearch/circuit-tracer. What a reader sees there, of one prompt:

- columns are the prompt's tokens, rows the student's layers, the embedding below and the logits above;
- every node of the circuit once, at the token where it is furthest from its mean (all others being frozen),
  called by its address and its label; clicking it lists its links in and out with their weights;
- a subgraph of the whole circuit, pinned, its nodes grouped by address;
- links: the student's weights between nodes; 1 from a write to every later read of its residual channel;
  the embedding's weight from the token into a read; the unembedding's weight from a write into both answers.

Weights, not attributions: they are the model's own and hold for every prompt. The page shades links by their
share of what enters a node. It draws as many rows as its record of the model has layers, so `scan` should
name a model of Neuronpedia's with the student's depth; and it refuses graphs with layer 0 alone.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from extractor.circuit_graph import to_networkx
from extractor.errors import InputError
from extractor.masks import Means
from extractor.sites import NODE_KINDS, Node, Recorder
from extractor.student import Student
from extractor.task_tokens import tokens_of

if TYPE_CHECKING:
    from extractor.circuit import Circuit

CIRCUIT_TRACER_SCHEMA = 1  # "feature" is the Cantor pairing of layer and index


@torch.no_grad()
def neuronpedia_graph(
    circuit: "Circuit",
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    means: Means,
    *,
    example: Mapping[str, str] | None = None,
    labels: Mapping[Node, str] | None = None,
    scan: str = "sparsebridge-student",
) -> dict[str, object]:
    """The graph of a circuit on one prompt, ready for `write_json`.

    Args:
        example: the prompt (`clean`) and its `answer` and `distractor`; by default the circuit's own example.
        labels: what nodes are called, beside their addresses.
        scan: what Neuronpedia calls the model.

    Raises:
        InputError: there is no example, or an answer is not one token.
    """
    example = example or circuit.evidence.get("example")
    if not example:
        raise InputError(f"circuit '{circuit.task}' holds no example prompt; give one")
    (ids,) = tokens_of([example["clean"]], tokenizer)
    answers = [_one_token(example[key], tokenizer) for key in ("answer", "distractor")]
    prompt = torch.tensor([ids], device=student.device)
    probability = circuit.compact(student, means)(prompt, 1).logits[0, -1].float().softmax(-1)
    recorder = Recorder()
    with circuit.applied(student, means):
        student(prompt, tap=recorder)
    places = {node: _place(recorder, node, means) for node in sorted(circuit.nodes, key=lambda n: n.sort_key)}
    names = {node: f"{node.layer}_{_index(node)}_{position}" for node, (position, _) in places.items()}
    tokens = {position: f"E_{ids[position]}_{position}" for position in range(len(ids))}
    last = len(ids) - 1
    top_row = student.config.num_hidden_layers
    outputs = {answer: f"{top_row}_{answer}_{last}" for answer in answers}
    return {
        "metadata": _metadata(circuit, [tokenizer.decode([token]) for token in ids], example["clean"], scan),
        "qParams": {
            "pinnedIds": [*names.values(), *outputs.values()],
            "supernodes": _groups(names),
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [
            *(_token_node(name, ids[p], p, tokenizer) for p, name in tokens.items()),
            *(_circuit_node(node, names[node], places[node], labels or {}) for node in places),
            *(
                _logit_node(name, a, last, top_row, float(probability[a]), tokenizer)
                for a, name in outputs.items()
            ),
        ],
        "links": [
            *_token_links(student, ids, places, names, tokens),
            *_circuit_links(circuit, student, names),
            *_logit_links(student, names, outputs),
        ],
    }


def _one_token(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    (ids,) = tokens_of([text], tokenizer)
    if len(ids) != 1:
        raise InputError(f"answer {text!r} is {len(ids)} tokens in this tokenizer; it must be one")
    return ids[0]


def _place(recorder: Recorder, node: Node, means: Means) -> tuple[int, float]:
    """Where the node is furthest from its mean, and its activation there."""
    values = recorder[node.address][0, :, node.channel].float()
    position = int((values - means[node.address][node.channel]).abs().argmax())
    return position, float(values[position])


def _index(node: Node) -> int:
    """One number per node of a layer: channel and kind."""
    return node.channel * len(NODE_KINDS) + NODE_KINDS.index(node.kind)


def _cantor(layer: int, index: int) -> int:
    return (layer + index) * (layer + index + 1) // 2 + index


def _metadata(circuit: "Circuit", tokens: list[str], prompt: str, scan: str) -> dict[str, object]:
    return {
        "slug": f"{circuit.task}-{circuit.student_sha256[:8]}".replace("_", "-").lower(),
        "scan": scan,
        "schema_version": CIRCUIT_TRACER_SCHEMA,
        "transcoder_list": [],
        "prompt_tokens": tokens,
        "prompt": prompt,
        "info": {
            "description": f"Circuit for {circuit.task}: {len(circuit.nodes)} nodes, {len(circuit.edges)} "
            "edges. Links are weights; each node stands at the token where it is furthest from its mean.",
            "generator": {"name": "sparsebridge"},
        },
        "generation_settings": {"student_sha256": circuit.student_sha256},
    }


def _groups(names: Mapping[Node, str]) -> list[list[str]]:
    """Supernodes: the nodes of an address, where there are several."""
    members: dict[str, list[str]] = defaultdict(list)
    for node, name in names.items():
        members[node.address].append(name)
    return [[address, *own] for address, own in members.items() if len(own) > 1]


def _circuit_node(
    node: Node, name: str, place: tuple[int, float], labels: Mapping[Node, str]
) -> dict[str, object]:
    position, activation = place
    label = labels.get(node)
    return {
        "node_id": name,
        "feature": _cantor(node.layer, _index(node)),
        "layer": str(node.layer),
        "ctx_idx": position,
        "feature_type": "cross layer transcoder",  # the one kind of feature that every view of the page knows
        "jsNodeId": f"{node.layer}_{_index(node)}-0",
        "clerp": f"{node}: {label}" if label else str(node),
        "influence": None,
        "activation": activation,
    }


def _token_node(name: str, token: int, position: int, tokenizer: PreTrainedTokenizerBase) -> dict:
    return {
        "node_id": name,
        "feature": position,
        "layer": "E",
        "ctx_idx": position,
        "feature_type": "embedding",
        "jsNodeId": f"E_{token}-{position}",
        "clerp": f'Emb: "{tokenizer.decode([token])}"',
        "influence": None,
        "activation": None,
    }


def _logit_node(
    name: str, token: int, position: int, row: int, probability: float, tokenizer: PreTrainedTokenizerBase
) -> dict[str, object]:
    return {
        "node_id": name,
        "feature": token,
        "layer": str(row),
        "ctx_idx": position,
        "feature_type": "logit",
        "token_prob": probability,
        "is_target_logit": True,
        "jsNodeId": f"L_{token}-{position}",
        "clerp": f'Output "{tokenizer.decode([token])}" (p={probability:.3f})',  # the page reads p from here
        "influence": None,
        "activation": None,
    }


def _token_links(
    student: Student,
    ids: list[int],
    places: Mapping[Node, tuple[int, float]],
    names: Mapping[Node, str],
    tokens: Mapping[int, str],
) -> list[dict[str, object]]:
    """From the token where a read stands, by what its embedding has in the read's channel."""
    embedding: Float[Tensor, "vocab d_sparse"] = student.embed_tokens.weight
    reads = {node: place for node, (place, _) in places.items() if node.kind.endswith("act_in")}
    links = [
        _link(tokens[place], names[node], float(embedding[ids[place], node.channel]))
        for node, place in reads.items()
    ]
    return [link for link in links if link["weight"]]


def _circuit_links(
    circuit: "Circuit", student: Student, names: Mapping[Node, str]
) -> list[dict[str, object]]:
    graph = to_networkx(circuit, parallel_residual=student.config.parallel_residual)
    of_name = {str(node): name for node, name in names.items()}
    return [
        _link(of_name[source], of_name[target], weight)
        for source, target, weight in graph.edges(data="weight")
    ]


def _logit_links(
    student: Student, names: Mapping[Node, str], outputs: Mapping[int, str]
) -> list[dict[str, object]]:
    unembedding: Float[Tensor, "vocab d_sparse"] = student.lm_head.weight
    links = [
        _link(names[node], output, float(unembedding[answer, node.channel]))
        for node in names
        if node.kind.endswith("resid_delta")
        for answer, output in outputs.items()
    ]
    return [link for link in links if link["weight"]]


def _link(source: str, target: str, weight: float) -> dict[str, object]:
    return {"source": source, "target": target, "weight": weight}
