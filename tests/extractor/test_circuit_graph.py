"""Circuits as graphs: networkx, comparison, Neuronpedia's graph JSON."""

import json
import random

import networkx as nx
import pytest
import torch

from extractor.circuit import Circuit, Edge, edges_between
from extractor.circuit_graph import compare, stream_links, to_networkx
from extractor.errors import InputError
from extractor.masks import mean_activations
from extractor.neuronpedia import neuronpedia_graph
from extractor.sites import Node, Recorder
from extractor.student import Student
from tests.conftest import tiny_student_config


def random_circuit(student: Student, count: int, seed: int) -> Circuit:
    means = mean_activations(student, torch.arange(24).view(2, 12))
    every = [Node(address, c) for address, mean in means.items() for c in range(len(mean))]
    nodes = frozenset(random.Random(seed).sample(every, count))
    return Circuit("t", nodes, edges_between(student, nodes), "sha", {})


def circuit_of(*nodes: str, edges: tuple = (), task: str = "t", sha: str = "sha") -> Circuit:
    joined = tuple(Edge(Node.parse(source), Node.parse(target), weight) for source, target, weight in edges)
    return Circuit(task, frozenset(map(Node.parse, nodes)), joined, sha, {})


# --- networkx --------------------------------------------------------------------------------------------


def test_the_graph_holds_every_node_and_weight(student: Student) -> None:
    circuit = random_circuit(student, 120, seed=0)
    graph = to_networkx(circuit, residual_links=False)
    assert {Node(d["address"], d["channel"]) for _, d in graph.nodes(data=True)} == circuit.nodes
    for name, d in graph.nodes(data=True):
        node = Node.parse(name)
        assert (d["kind"], d["layer"]) == (node.kind, node.layer)
    assert {(s, t, w) for s, t, w in graph.edges(data="weight")} == {
        (str(e.source), str(e.target), e.weight) for e in circuit.edges
    }
    assert {kind for *_, kind in graph.edges(data="kind")} == {"weight"}
    assert nx.is_directed_acyclic_graph(to_networkx(circuit))


def test_weights_of_grouped_queries_are_one_edge() -> None:
    student = Student(tiny_student_config(num_key_value_heads=2)).eval()  # 2 query heads per v channel
    nodes = frozenset({Node("0.attn.v", 9), Node("0.attn.resid_delta", 3)})
    circuit = Circuit("t", nodes, edges_between(student, nodes), "sha", {})
    graph = to_networkx(circuit)
    (edge,) = [d for *_, d in graph.edges(data=True)]
    assert edge["weights"] == [e.weight for e in circuit.edges]
    assert len(edge["weights"]) == 2
    assert edge["weight"] == max(edge["weights"], key=abs)


def test_a_write_is_linked_to_every_later_read_of_its_channel() -> None:
    circuit = circuit_of(
        "0.attn.act_in:5", "0.attn.resid_delta:5", "0.mlp.act_in:5", "0.mlp.resid_delta:5",
        "1.attn.act_in:5", "1.attn.act_in:6", "1.mlp.act_in:5", "1.mlp.resid_delta:5",
    )  # fmt: skip
    expected = {
        ("0.attn.resid_delta:5", "0.mlp.act_in:5"),
        ("0.attn.resid_delta:5", "1.attn.act_in:5"),
        ("0.attn.resid_delta:5", "1.mlp.act_in:5"),
        ("0.mlp.resid_delta:5", "1.attn.act_in:5"),
        ("0.mlp.resid_delta:5", "1.mlp.act_in:5"),
    }
    graph = to_networkx(circuit)
    assert set(graph.edges) == expected
    assert {(d["kind"], d["weight"]) for *_, d in graph.edges(data=True)} == {("residual", 1.0)}
    parallel = stream_links(circuit.nodes, parallel_residual=True)
    assert expected - {(str(w), str(r)) for w, r in parallel} == {("0.attn.resid_delta:5", "0.mlp.act_in:5")}


def test_a_residual_link_is_where_a_write_reaches(tokens: torch.Tensor) -> None:
    """The links against the model: changing a write changes the reads it is linked to, and no earlier one."""
    for parallel in (False, True):
        student = Student(tiny_student_config(parallel_residual=parallel, pre_norm=False)).eval()
        kinds = ("attn.act_in", "attn.resid_delta", "mlp.act_in", "mlp.resid_delta")
        circuit = circuit_of(*(f"{layer}.{kind}:7" for layer in (0, 1) for kind in kinds))
        graph = to_networkx(circuit, parallel_residual=parallel)
        before = Recorder()
        student(tokens, tap=before)
        for write in (n for n in circuit.nodes if n.kind.endswith("resid_delta")):
            after = Recorder()

            def push(
                address: str, activation: torch.Tensor, write: Node = write, after: Recorder = after
            ) -> torch.Tensor:
                after(address, activation)
                return activation + 1 if address == write.address else activation

            student(tokens, tap=push)
            reads = [n for n in circuit.nodes if n.kind.endswith("act_in")]
            moved = {n for n in reads if not torch.equal(after[n.address], before[n.address])}
            assert {str(n) for n in moved} == set(graph.successors(str(write)))


# --- comparison ------------------------------------------------------------------------------------------


def test_a_circuit_compared_with_itself_is_all_shared(student: Student) -> None:
    circuit = random_circuit(student, 80, seed=0)
    same = compare(circuit, circuit)
    assert same.nodes.jaccard == same.edges.jaccard == 1
    assert same.same_student
    assert len(same.nodes.shared) == 80
    assert not same.nodes.only_here
    assert not same.edges.only_there


def test_comparison_counts_nodes_and_edges_by_address() -> None:
    read, neuron, write = "0.mlp.act_in:1", "0.mlp.post_act:2", "0.mlp.resid_delta:3"
    here = circuit_of(read, neuron, write, edges=((read, neuron, 1.0), (neuron, write, 2.0)))
    there = circuit_of(read, neuron, "1.attn.v:0", edges=((read, neuron, -7.0),), task="other", sha="another")
    found = compare(here, there)
    assert found.nodes.shared == (read, neuron)
    assert found.nodes.only_here == (write,)
    assert found.nodes.only_there == ("1.attn.v:0",)
    assert found.nodes.jaccard == 2 / 4
    assert found.edges.shared == ((read, neuron),)  # weights do not count
    assert found.edges.only_here == ((neuron, write),)
    assert found.edges.jaccard == 1 / 2
    assert not found.same_student
    assert list(found.nodes_at) == ["0.mlp.act_in", "0.mlp.post_act", "0.mlp.resid_delta", "1.attn.v"]
    assert [found.nodes_at[a].jaccard for a in found.nodes_at] == [1, 1, 0, 0]
    assert found.edges_at[("0.mlp.post_act", "0.mlp.resid_delta")].only_here == ((neuron, write),)
    json.dumps(found.to_json(), allow_nan=False)


def test_comparison_turned_round(student: Student) -> None:
    one, other = random_circuit(student, 60, seed=0), random_circuit(student, 90, seed=1)
    here, there = compare(one, other), compare(other, one)
    assert here.nodes.only_here == there.nodes.only_there
    assert here.edges.shared == there.edges.shared
    assert sum(len(at.shared) for at in here.nodes_at.values()) == len(one.nodes & other.nodes)
    assert sum(len(at.only_here) for at in here.edges_at.values()) == len(here.edges.only_here)


def test_circuits_without_edges_have_no_jaccard_of_edges() -> None:
    empty = circuit_of("0.mlp.act_in:1")
    assert compare(empty, empty).edges.jaccard == {"undefined": "both are empty"}


# --- Neuronpedia -----------------------------------------------------------------------------------------

# Required keys and types of graph-schema.json 1.0.0; `null` where it is allowed.
NULL = type(None)
REQUIRED = {
    "metadata": {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str},
    "node": {
        "node_id": str, "feature": (int, NULL), "layer": (str, int), "ctx_idx": int, "feature_type": str,
        "jsNodeId": str, "clerp": str,
    },
    "link": {"source": str, "target": str, "weight": (int, float)},
}  # fmt: skip
OPTIONAL = {
    "metadata": {"feature_details": dict, "node_threshold": (int, float), "info": dict,
                 "generation_settings": dict, "pruning_settings": dict},
    "node": {"influence": (int, float, NULL), "activation": (int, float, NULL)},
    "link": {},
    "qParams": {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str},
}  # fmt: skip
EXAMPLE = {"clean": "x = call(items[0", "answer": "]", "distractor": ")"}


def fits_schema(value: dict, part: str) -> bool:
    required = REQUIRED.get(part, {})
    kinds = required | OPTIONAL[part]
    texts = [*value.get("prompt_tokens", ()), *value.get("pinnedIds", ())]
    return (
        required.keys() <= value.keys()
        and all(isinstance(value[key], kind) for key, kind in kinds.items() if key in value)
        and all(isinstance(text, str) for text in texts)
    )


@pytest.fixture
def speaking(shipped_tokenizer) -> tuple[Student, Circuit, dict[str, torch.Tensor]]:
    student = Student(tiny_student_config(vocab_size=len(shipped_tokenizer))).eval()
    means = mean_activations(student, torch.arange(64).view(4, 16))
    return student, random_circuit(student, 60, seed=3), means


def test_the_export_fits_the_published_schema(speaking, shipped_tokenizer) -> None:
    student, circuit, means = speaking
    label = {next(iter(circuit.nodes)): "high on the token '('"}
    graph = neuronpedia_graph(
        circuit, student, shipped_tokenizer, means, example=EXAMPLE, labels=label, scan="gpt2-small"
    )
    graph = json.loads(json.dumps(graph, allow_nan=False))
    assert graph.keys() == {"metadata", "qParams", "nodes", "links"}
    assert fits_schema(graph["metadata"], "metadata")
    assert fits_schema(graph["qParams"], "qParams")
    assert all(fits_schema(node, "node") for node in graph["nodes"])
    assert all(fits_schema(link, "link") for link in graph["links"])
    assert "".join(graph["metadata"]["prompt_tokens"]) == EXAMPLE["clean"]
    assert graph["metadata"]["scan"] == "gpt2-small"
    assert sum("high on the token '('" in node["clerp"] for node in graph["nodes"]) == 1


def test_the_export_has_what_the_page_relies_on(speaking, shipped_tokenizer) -> None:
    student, circuit, means = speaking
    graph = neuronpedia_graph(circuit, student, shipped_tokenizer, means, example=EXAMPLE)
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"])
    # the page's own key of a node, and its columns
    assert len({(n["layer"], n["feature"], n["ctx_idx"]) for n in nodes.values()}) == len(nodes)
    assert {n["ctx_idx"] for n in nodes.values()} <= set(range(len(graph["metadata"]["prompt_tokens"])))
    assert {end for link in graph["links"] for end in (link["source"], link["target"])} <= nodes.keys()
    pinned = graph["qParams"]["pinnedIds"]
    assert set(pinned) <= nodes.keys()
    assert {i for _, *members in graph["qParams"]["supernodes"] for i in members} <= set(pinned)
    outputs = [node for node in nodes.values() if node["feature_type"] == "logit"]
    assert len(outputs) == 2
    assert all(f"(p={node['token_prob']:.3f})" in node["clerp"] for node in outputs)
    assert max(int(n["layer"]) for n in nodes.values() if n["feature_type"] not in ("embedding", "logit")) > 0


def test_the_export_has_the_circuits_weights_and_places(speaking, shipped_tokenizer) -> None:
    student, circuit, means = speaking
    graph = neuronpedia_graph(circuit, student, shipped_tokenizer, means, example=EXAMPLE)
    called = {node["node_id"]: node["clerp"] for node in graph["nodes"]}
    weights = {(called[e["source"]], called[e["target"]]): e["weight"] for e in graph["links"]}
    for edge in circuit.edges:
        assert weights[str(edge.source), str(edge.target)] == edge.weight
    for write, read in stream_links(circuit.nodes):
        assert weights[str(write), str(read)] == 1
    tokens = shipped_tokenizer(EXAMPLE["clean"], add_special_tokens=False)["input_ids"]
    answer = shipped_tokenizer("]", add_special_tokens=False)["input_ids"][0]
    (output,) = (name for name in called.values() if name.startswith('Output "]"'))
    compact = circuit.compact(student, means)(torch.tensor([tokens])).logits[0, -1].softmax(-1)
    assert output.endswith(f"(p={compact[answer]:.3f})")
    write = next(n for n in sorted(circuit.nodes, key=str) if n.kind.endswith("resid_delta"))
    assert weights[str(write), output] == student.lm_head.weight[answer, write.channel].item()
    recorder, tap = Recorder(), circuit.tap(means)
    student(torch.tensor([tokens]), tap=lambda a, x: recorder(a, tap(a, x)))
    for node in graph["nodes"]:
        if node["activation"] is not None:
            own = Node.parse(node["clerp"])
            values = recorder[own.address][0, :, own.channel]
            assert node["activation"] == pytest.approx(values[node["ctx_idx"]].item())
            far = (values - means[own.address][own.channel]).abs()
            assert far[node["ctx_idx"]] == far.max()


def test_an_export_without_a_prompt_or_with_a_long_answer_is_refused(speaking, shipped_tokenizer) -> None:
    student, circuit, means = speaking
    with pytest.raises(InputError, match="no example prompt"):
        neuronpedia_graph(circuit, student, shipped_tokenizer, means)
    long = EXAMPLE | {"answer": "two words"}
    with pytest.raises(InputError, match="must be one"):
        neuronpedia_graph(circuit, student, shipped_tokenizer, means, example=long)
