"""What a node means: text predicates, tested labels, effects against brute force, contexts."""

import json
import random

import pytest
import torch
import torch.nn.functional as F

from extractor.circuit import Circuit, edges_between, keep_nodes
from extractor.masks import mean_activations
from extractor.meaning import contexts, describe_nodes, node_effects, record_nodes
from extractor.node_labels import average_ranks, block_wins, is_supported, label_nodes, labels_of
from extractor.predicates import scan, text_predicates
from extractor.sites import Node, Recorder
from extractor.student import Student
from extractor.tasks import TaskBatch
from tests.conftest import ROOT, tiny_student_config

# --- text ------------------------------------------------------------------------------------------------


def marks(text: str) -> str:
    """One letter per character: the quote, comment or bracket that one is in after it."""
    return "".join(
        r.quote[:1] or ("#" if r.in_comment else "") or (r.brackets[-1:] or ".") for r in scan(text)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f(a)", ".((."),
        ("x['k']", ".[''[."),
        ("'a\\'b'", "'''''."),
        ("a # 'b\nc", "..####.."),
        ("don't (so)", "......(((."),
        ("rb'a'c", "..''.."),
        ('"""a"b"""c', '"' * 6 + "...."),
        ("'open\nx", "'''''.."),
        ("([)]", "([[("),
    ],
)
def test_scan_knows_strings_comments_and_brackets(text: str, expected: str) -> None:
    assert marks(text) == expected


def holding(predicates: dict, phrase: str, ids: torch.Tensor, tokenizer) -> list[str]:
    """The tokens of the first block at which a phrase holds."""
    return [tokenizer.decode([token]) for token in ids[0][predicates[phrase][0]].tolist()]


def test_predicates_name_the_tokens_they_hold_at(shipped_tokenizer) -> None:
    text = 'def go(x):\n    return x["k"]  # say\n'
    ids = torch.tensor([shipped_tokenizer(text, add_special_tokens=False)["input_ids"]])
    found = text_predicates(ids, shipped_tokenizer, min_count=1)
    assert "".join(holding(found, "inside double quotes", ids, shipped_tokenizer)).endswith("k")
    assert "".join(holding(found, "inside a comment", ids, shipped_tokenizer)).strip() == "# say"
    assert holding(found, "at the first position", ids, shipped_tokenizer) == ["def"]
    assert "".join(holding(found, "in a line that starts with 'def'", ids, shipped_tokenizer)) == "def go(x):"
    assert holding(found, "after the token 'def'", ids, shipped_tokenizer) == [" g"]
    assert set(holding(found, "on the token 'x'", ids, shipped_tokenizer)) == {"x"}
    assert all("(" in piece for piece in holding(found, "on a token with '('", ids, shipped_tokenizer))
    assert found.keys().isdisjoint({"inside single quotes", "on a closing single quote"})
    assert all(0 < holds.sum() < holds.numel() for holds in found.values())


def test_end_of_text_starts_a_new_text(shipped_tokenizer) -> None:
    eos = shipped_tokenizer.eos_token_id
    parts = [shipped_tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("f(x, ", "a = b")]
    ids = torch.tensor([[*parts[0], eos, *parts[1]]])
    found = text_predicates(ids, shipped_tokenizer, min_count=1)
    inside = found["inside round brackets"][0]
    assert inside.any()
    assert not inside[len(parts[0]) :].any()
    assert found["after the token end of text"][0].nonzero().tolist() == [[len(parts[0]) + 1]]


# --- labels ----------------------------------------------------------------------------------------------


def test_ranks_and_auroc_are_those_of_counting_pairs() -> None:
    assert average_ranks(torch.tensor([[3.0], [1.0], [3.0], [2.0]]))[:, 0].tolist() == [3.5, 1, 3.5, 2]
    values = torch.randint(0, 6, (7, 9)).float()  # many ties
    holds = torch.rand(7, 9) < 0.3
    wins, num_with, num_without = block_wins(values, holds)
    with_it, without = values[holds][:, None], values[~holds][None]
    by_hand = ((with_it > without).double() + 0.5 * (with_it == without).double()).mean()
    assert wins.sum() / (num_with.sum() * num_without.sum()) == pytest.approx(by_hand.item())
    chosen = [0, 0, 3]  # a resample: blocks with how often they were drawn
    repeated, has_it = values[chosen], holds[chosen]
    twice, n, m = block_wins(repeated, has_it)
    times = torch.bincount(torch.tensor(chosen), minlength=7).double()
    assert twice.sum() == times @ wins @ times
    assert (n.sum(), m.sum()) == (times @ num_with, times @ num_without)


@pytest.fixture
def properties() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    rates = {"here": 0.1, "there": 0.1, "often": 0.7, "seldom": 0.0005} | {f"p{i}": 0.02 for i in range(40)}
    return {name: torch.rand(48, 64, generator=generator) < rate for name, rate in rates.items()}


def test_only_a_property_that_is_told_apart_becomes_a_label(properties: dict[str, torch.Tensor]) -> None:
    here, there = properties["here"].float(), properties["there"].float()
    noise = torch.randn(48, 64, 6)
    nodes = torch.stack(
        [
            5 * here + noise[..., 0],
            5 * here - 5 * there + noise[..., 1],
            here + noise[..., 2],  # a weak hint
            properties["often"] * 5 + noise[..., 3],  # holds too often to mean much
            properties["seldom"] * 9 + noise[..., 4],  # holds too seldom to be tested
            noise[..., 5],
        ],
        dim=-1,
    )
    found = label_nodes(nodes, properties, seed=0)
    assert [labels_of(node) for node in found] == [
        ["high here"], ["high here", "low there"], [], [], [], [],
    ]  # fmt: skip
    test = found[0]["high"]
    low, high = test["auroc_interval"]
    assert low <= test["auroc"] <= high
    assert test["base_rate"] == pytest.approx(0.1, abs=0.03)
    assert test["positions"] == 24 * 64  # the half that did not choose


def test_noise_gets_no_label(properties: dict[str, torch.Tensor]) -> None:
    found = label_nodes(torch.randn(48, 64, 120), properties, seed=0)
    assert not any(labels_of(node) for node in found)


def test_a_label_that_holds_in_the_choosing_half_alone_is_dropped(properties) -> None:
    chosen_on = torch.randperm(48, generator=torch.Generator().manual_seed(3))[:24]
    values = torch.randn(48, 64, 1)
    values[chosen_on] += 9 * properties["here"][chosen_on][..., None]
    (node,) = label_nodes(values, properties, seed=3)
    assert node["high"]["property"] == "here"
    assert node["high"]["label"] is None
    assert not is_supported(node["high"])


def test_precision_keeps_a_rare_property_from_being_a_label() -> None:
    """A node that is high on many things is not called after one of them, however high its AUROC."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.rand(48, 64, generator=generator) < 0.08
    rare = wide & (torch.rand(48, 64, generator=generator) < 0.2)
    values = (5 * wide + torch.randn(48, 64, generator=generator))[..., None]
    (node,) = label_nodes(values, {"rare": rare}, seed=0)
    assert node["high"]["auroc"] > 0.95
    assert node["high"]["label"] is None
    (node,) = label_nodes(values, {"rare": rare, "wide": wide}, seed=0)
    assert labels_of(node) == ["high wide"]


# --- effects ---------------------------------------------------------------------------------------------


@pytest.fixture(params=[{}, {"parallel_residual": True}], ids=["serial", "parallel"])
def case(request: pytest.FixtureRequest) -> tuple[Student, Circuit, dict, TaskBatch]:
    student = Student(tiny_student_config(**request.param)).eval()
    generator = torch.Generator().manual_seed(4)
    means = mean_activations(student, torch.randint(1, 97, (8, 12), generator=generator))
    every = [Node(address, c) for address, mean in means.items() for c in range(len(mean))]
    nodes = frozenset(random.Random(1).sample(every, 40))
    circuit = Circuit("t", nodes, edges_between(student, nodes), "sha", {})
    last = torch.randint(5, 12, (10,), generator=generator)
    answer = torch.randint(1, 97, (5,), generator=generator)
    answers = torch.cat([answer, answer + 1]) % 97
    ids = torch.randint(1, 97, (10, 12), generator=generator)
    return student, circuit, means, TaskBatch(ids, last, answers, answers.roll(5))


def in_order(circuit: Circuit) -> list[Node]:
    return sorted(circuit.nodes, key=lambda n: n.sort_key)


@torch.no_grad()
def test_total_effect_is_the_circuit_without_the_node(case) -> None:
    student, circuit, means, prompts = case
    total = node_effects(student, circuit, means, prompts)["total"]

    def difference(nodes) -> torch.Tensor:
        return prompts.logit_difference(student(prompts.ids, tap=keep_nodes(nodes, means)).logits)

    whole = difference(circuit.nodes)
    for index, node in enumerate(in_order(circuit)):
        expected = whole - difference(circuit.nodes - {node})
        torch.testing.assert_close(total[:, index], expected, atol=2e-5, rtol=1e-4)
    assert (total.abs().amax(0) > 1e-3).sum() > 10  # and most nodes do something


@torch.no_grad()
def test_direct_effect_is_the_change_of_the_own_write_alone(case) -> None:
    student, circuit, means, prompts = case
    direct = node_effects(student, circuit, means, prompts)["direct"]

    def record(nodes) -> Recorder:
        recorder, tap = Recorder(), keep_nodes(nodes, means)
        student(prompts.ids, tap=lambda a, x: recorder(a, tap(a, x)))
        return recorder

    def difference(final: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(final, final.shape[-1:], eps=student.config.rms_norm_eps)
        return prompts.logit_difference(student.lm_head(normed))

    whole = record(circuit.nodes)
    final = whole["final_resid"]
    for index, node in enumerate(in_order(circuit)):
        own = f"{node.address.rpartition('.')[0]}.resid_delta"
        moved = record(circuit.nodes - {node})[own] - whole[own]  # nothing before the sublayer has changed
        expected = difference(final) - difference(final + moved)
        torch.testing.assert_close(direct[:, index], expected, atol=2e-5, rtol=1e-4)


def test_effects_obey_closed_edges(case) -> None:
    """A node whose edges out are all closed does nothing, though its sublayer writes."""
    student, circuit, means, prompts = case
    source = next(e.source for e in circuit.edges if e.source.kind == "mlp.post_act")
    kept = tuple(edge for edge in circuit.edges if edge.source != source)
    cut = Circuit("t", circuit.nodes, kept, "sha", {})
    index = in_order(circuit).index(source)
    for kind, effect in node_effects(student, circuit, means, prompts).items():
        assert effect[:, index].abs().max() > 1e-4, kind
    for effect in node_effects(student, cut, means, prompts).values():
        assert effect[:, index].abs().max() < 1e-5


# --- the whole description -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(shipped_tokenizer) -> torch.Tensor:
    """Blocks of this repository's own source."""
    sources = sorted((ROOT / "extractor").glob("*.py"))[:12]
    ids = shipped_tokenizer("".join(path.read_text() for path in sources), add_special_tokens=False)
    return torch.tensor(ids["input_ids"])[: 24 * 64].view(24, 64)


@pytest.fixture
def described(shipped_tokenizer, text) -> tuple[Student, Circuit, list[dict]]:
    """A student in which channel 5 is written by one token's embedding and channel 6 raises its logit."""
    student = Student(
        tiny_student_config(vocab_size=len(shipped_tokenizer), max_position_embeddings=64)
    ).eval()
    comma = shipped_tokenizer.convert_tokens_to_ids(",")
    with torch.no_grad():
        for weight in (student.embed_tokens.weight, student.embed_positions.weight):
            weight[:, 5] = 0
        student.embed_tokens.weight[comma, 5] = 4
        student.lm_head.weight[:, 6] = 0
        student.lm_head.weight[comma, 6] = -2
    means = mean_activations(student, text)
    names = ["0.attn.act_in:5", "0.attn.q:9", "0.attn.v:1", "0.attn.resid_delta:6", "1.mlp.act_in:6"]
    nodes = frozenset(map(Node.parse, [*names, "1.mlp.post_act:3", "1.mlp.resid_delta:6"]))
    circuit = Circuit("t", nodes, edges_between(student, nodes), "sha", {})
    answers = torch.tensor([3, 4, 5, 6])
    cluster = torch.tensor([0, 1, 0, 1])
    prompts = TaskBatch(text[:4, :9], torch.full((4,), 8), answers, answers.roll(2), cluster)
    nodes = describe_nodes(student, shipped_tokenizer, circuit, means, text, prompts, 0)
    effects = node_effects(student, circuit, means, prompts)
    for index, node in enumerate(nodes):
        for kind, effect in node["effect"].items():
            assert effect["value"] == pytest.approx(effects[kind][:, index].mean().item(), abs=1e-7)
            assert effect["clusters"] == 2
    return student, circuit, nodes


def test_every_node_is_described_in_plain_json(described) -> None:
    _, circuit, nodes = described
    json.dumps(nodes, allow_nan=False)
    assert [node["node"] for node in nodes] == [str(node) for node in in_order(circuit)]
    of = {node["node"]: node for node in nodes}
    for edge in circuit.edges:
        assert {"node": str(edge.target), "weight": edge.weight} in of[str(edge.source)]["weights_out"]
        assert {"node": str(edge.source), "weight": edge.weight} in of[str(edge.target)]["weights_in"]
    assert of["0.attn.resid_delta:6"]["read_by"] == ["1.mlp.act_in:6"]
    assert of["1.mlp.act_in:6"]["written_by"] == ["0.attn.resid_delta:6"]
    assert of["0.attn.q:9"]["head"] == 1  # heads of 8 channels


def test_a_planted_detector_is_named(described) -> None:
    student, _, nodes = described
    of = {node["node"]: node for node in nodes}
    detector = of["0.attn.act_in:5"]
    assert labels_of(detector["labels"]) == ["high on the token ','"]
    assert {context["token"] for context in detector["top"]} == {","}
    assert [entry["token"] for entry in detector["embedding"]["most"]] == [","]
    assert detector["embedding"]["nonzero"] == 1
    promoter = of["1.mlp.resid_delta:6"]["unembedding"]
    assert promoter["most"] == []
    assert promoter["least"] == [{"token": ",", "weight": -2.0}]
    assert of["1.mlp.post_act:3"]["bias"] == student.layers[1].mlp.up_proj.bias[3].item()


def test_contexts_are_the_extremes_with_the_token_marked(described, shipped_tokenizer, text) -> None:
    student, circuit, _ = described
    nodes = in_order(circuit)
    activations = record_nodes(student, nodes, text)
    recorder = Recorder()
    student(text, tap=recorder)
    for index, node in enumerate(nodes):
        expected = recorder[node.address][..., node.channel]
        torch.testing.assert_close(activations[..., index], expected, atol=1e-5, rtol=1e-5)
    one = activations[..., 3]
    top, bottom = (contexts(one, text, shipped_tokenizer, 4, lowest=lowest) for lowest in (False, True))
    assert top[0]["activation"] == one.max().item()
    assert bottom[0]["activation"] == one.min().item()
    assert len({context["block"] for context in top}) == 4
    for context in [*top, *bottom]:
        whole = shipped_tokenizer.decode(text[context["block"]].tolist())
        assert context["before"] + context["token"] + context["after"] in whole
        assert one[context["block"], context["position"]].item() == context["activation"]
