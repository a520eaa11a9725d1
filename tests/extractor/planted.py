"""Students whose circuit for a task is known: every weight of it is written by hand.

A planted student is random machinery (heads, neurons and channels that carry signal on any text, and read the
circuit's channels too) around a hand-written circuit. The circuit has stream channels of its own: random
machinery does not write them, and the answers' logit difference reads no others. What else writes them is
written by hand too and carries nothing on the task's prompts. So every path to the answer goes through the
planted nodes, and none of them or of their edges can be spared: `test_planted.py` checks it.

Which side of a pair is the clean one is drawn, so no shift between the sides can answer anything.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from extractor.sites import Node
from extractor.student import Student
from extractor.tasks import TaskBatch
from tests.conftest import tiny_student_config

VOCAB, YES, NO = 56, 1, 2
DECOYS = range(20, 28)  # tokens of a kind that nothing asks for; even: kind +, odd: kind -
STRANGERS = (28, 29)  # in no prompt; on text, other machinery writes the answer for them
ORDINARY = range(30, VOCAB)  # tokens without a feature of the task; 3 to 19 may have one
ANSWER_WEIGHT = 3.0

Prompt = list[int]
Pair = tuple[Prompt, Prompt]  # answered by YES and by NO
MakePair = Callable[[random.Random], Pair]


@dataclass(frozen=True)
class Planted:
    """A student, its task, and the one circuit that solves it."""

    student: Student
    make_pair: MakePair
    nodes: frozenset[Node]
    edges: frozenset[tuple[Node, Node]]
    idle: frozenset[tuple[Node, Node]]
    """Weights between planted nodes that the task does not need."""

    def prompts(self, count: int, seed: int) -> TaskBatch:
        """2 * count examples, right-padded."""
        rng = random.Random(seed)
        pairs = [self.make_pair(rng) for _ in range(count)]
        is_yes = [rng.random() < 0.5 for _ in pairs]
        clean = [pair[0 if yes else 1] for pair, yes in zip(pairs, is_yes, strict=True)]
        corrupted = [pair[1 if yes else 0] for pair, yes in zip(pairs, is_yes, strict=True)]
        prompts = clean + corrupted
        width = max(map(len, prompts))
        yes = torch.tensor(is_yes + [not side for side in is_yes])
        return TaskBatch(
            ids=torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts]),
            last=torch.tensor([len(prompt) - 1 for prompt in prompts]),
            answer=torch.where(yes, YES, NO),
            distractor=torch.where(yes, NO, YES),
        )

    def text(self) -> Int[Tensor, "block seq"]:
        """Any text: tokens drawn alike."""
        return torch.randint(1, VOCAB, (64, 16), generator=torch.Generator().manual_seed(0))


class Planter:
    """Writes a circuit into a random student; what `edge` and `node` name is the circuit."""

    def __init__(self, *channels: str, **changes: object):
        """`channels` names the circuit's own channels of the stream; the answers read the last."""
        settings = {
            "vocab_size": VOCAB, "hidden_size": 24, "num_attention_heads": 4, "head_dim": 4,
            "intermediate_size": 32, "initializer_range": 0.25,
        }  # fmt: skip
        self.student = Student(tiny_student_config(**(settings | changes))).eval().requires_grad_(False)
        self.channels = {name: index for index, name in enumerate(("stranger", *channels))}
        self._nodes: set[Node] = set()
        self._edges: set[tuple[Node, Node]] = set()
        self._idle: set[tuple[Node, Node]] = set()
        self._emptied: set[Node] = set()
        self._make_room()

    def _make_room(self) -> None:
        """Nothing writes the circuit's own channels; the answers differ by the last of them alone."""
        own, head = len(self.channels), self.student.lm_head
        self.student.embed_tokens.weight.mul_(2)[:, :own] = 0
        if self.student.embed_positions is not None:
            self.student.embed_positions.weight[:, :own] = 0
        for layer in self.student.layers:
            layer.attn.o_proj.weight[:own] = 0
            layer.mlp.down_proj.weight[:own] = 0
        head.weight[NO] = head.weight[YES]
        head.weight[[YES, NO], own - 1] = torch.tensor([ANSWER_WEIGHT, -ANSWER_WEIGHT])

    def token(self, *tokens: int, **features: float) -> None:
        """What tokens' embeddings hold in the circuit's own channels."""
        for name, value in features.items():
            self.student.embed_tokens.weight[list(tokens), self.channels[name]] = value

    def kinds(self) -> None:
        """Decoys have a kind, which nothing asks for."""
        self.token(*DECOYS[::2], kind=3.0)
        self.token(*DECOYS[1::2], kind=-3.0)

    def node(self, name: str) -> None:
        """A node of the circuit without an edge in it."""
        self._nodes.add(self._node(name))

    def edge(self, source: str, target: str, weight: float, *, head: int = 0, gate: bool = False) -> None:
        """A weight of the circuit: "0.mlp.act_in:kind" to "0.mlp.post_act:3", or to that neuron's gate.

        `head`: which query head of the group carries a v channel.
        """
        ends = self._node(source), self._node(target)
        self._nodes.update(ends)
        self._edges.add(ends)
        self._write(*ends, weight, head, gate)

    def idle(self, source: str, target: str, weight: float) -> None:
        """A weight that carries signal on text, and nothing that the task's answers depend on."""
        ends = self._node(source), self._node(target)
        self._idle.add(ends)
        self._write(*ends, weight, 0, gate=False)

    def bias(self, target: str, value: float, *, gate: bool = False) -> None:
        node = self._node(target)
        self._into(node, gate).bias[node.channel] = value

    def copying_head(self, prefix: str, *, ask: str, mark: str, kind: str, out: str) -> None:
        """Head 0: the last token, which asks, finds the marked token and takes its kind."""
        self.soften_head(int(prefix[0]), 0, 0)
        self.edge(f"{prefix}.act_in:{ask}", f"{prefix}.q:0", 2.5)
        self.edge(f"{prefix}.act_in:{mark}", f"{prefix}.k:0", 2.5)
        self.edge(f"{prefix}.act_in:{kind}", f"{prefix}.v:0", 1.0)
        self.edge(f"{prefix}.v:0", f"{prefix}.resid_delta:{out}", 2.0)

    def soften_head(self, layer: int, query_head: int, key_head: int) -> None:
        """Random queries and keys beside the circuit's may not find the marked token by chance."""
        attn = self.student.layers[layer].attn
        for linear, head in ((attn.q_proj, query_head), (attn.k_proj, key_head)):
            linear.weight[head * attn.head_dim : (head + 1) * attn.head_dim] *= 0.25

    def previous_token_head(self, layer: int, size: float = 8.0) -> None:
        """Head 0 looks one token back: q and k are constants, apart by the turn of one position."""
        attn = self.student.layers[layer].attn
        for channel in range(attn.head_dim):
            self._node(f"{layer}.attn.q:{channel}")
            self._node(f"{layer}.attn.k:{channel}")
        cos, sin = self.student.rotary["full_attention"](torch.zeros(1), torch.tensor([[1]]))
        half = attn.head_dim // 2
        attn.q_proj.bias[:half] = size
        attn.k_proj.bias[:half] = size * cos[0, 0, :half]
        attn.k_proj.bias[half : 2 * half] = size * sin[0, 0, :half]

    def planted(self, make_pair: MakePair) -> Planted:
        self._answer_strangers()
        idle = {edge for edge in self._idle if self._nodes.issuperset(edge)}
        return Planted(
            self.student, make_pair, frozenset(self._nodes), frozenset(self._edges), frozenset(idle)
        )

    def _answer_strangers(self) -> None:
        """A value of the last head and the last neuron write the answer for tokens of no prompt."""
        config, out = self.student.config, list(self.channels)[-1]
        value = f"0.attn.v:{config.num_key_value_heads * config.head_dim - 1}"
        neuron = f"{config.num_hidden_layers - 1}.mlp.post_act:{config.intermediate_size - 1}"
        self.token(*STRANGERS, stranger=3.0)
        for unit in (value, neuron):
            sublayer = unit.rpartition(".")[0]
            self.idle(f"{sublayer}.act_in:stranger", unit, 1.0)
            self.idle(unit, f"{sublayer}.resid_delta:{out}", 1.0)

    def _node(self, name: str) -> Node:
        """A node by its channel's number or name; a unit loses its random weights when first named."""
        address, _, channel = name.partition(":")
        node = Node(address, self.channels[channel] if channel in self.channels else int(channel))
        if node not in self._emptied and node.kind in ("attn.q", "attn.k", "attn.v", "mlp.post_act"):
            self._empty(node)
        self._emptied.add(node)
        return node

    def _empty(self, node: Node) -> None:
        layer = self.student.layers[node.layer]
        for gate in (False, True):
            linear = self._into(node, gate)
            if linear is not None:
                linear.weight[node.channel] = 0
                linear.bias[node.channel] = 0
        if node.kind == "attn.v":
            layer.attn.o_proj.weight[:, self._columns(node)] = 0
        if node.kind == "mlp.post_act":
            layer.mlp.down_proj.weight[:, node.channel] = 0

    def _into(self, node: Node, gate: bool) -> nn.Linear | None:
        """The matrix whose rows are the channels of this node's address."""
        layer = self.student.layers[node.layer]
        if node.kind == "mlp.post_act":
            return layer.mlp.gate_proj if gate else layer.mlp.up_proj
        names = {"attn.resid_delta": "attn.o_proj", "mlp.resid_delta": "mlp.down_proj"}
        return layer.get_submodule(names.get(node.kind, f"{node.kind}_proj"))

    def _write(self, source: Node, target: Node, weight: float, head: int, gate: bool) -> None:
        column = self._columns(source)[head] if source.kind == "attn.v" else source.channel
        self._into(target, gate).weight[target.channel, column] = weight

    def _columns(self, value: Node) -> list[int]:
        """A v channel's columns of o_proj, one per query head of its group."""
        attn = self.student.layers[value.layer].attn
        head, within = divmod(value.channel, attn.head_dim)
        query_heads = range(head * attn.group_size, (head + 1) * attn.group_size)
        return [query_head * attn.head_dim + within for query_head in query_heads]


def body(rng: random.Random, *, decoys: int, least: int = 10, most: int = 14) -> Prompt:
    """Ordinary tokens and decoys."""
    tokens = rng.choices(DECOYS, k=decoys) + rng.choices(ORDINARY, k=rng.randint(least, most) - decoys)
    rng.shuffle(tokens)
    return tokens


def with_token(prompt: Prompt, where: int, token: int) -> Prompt:
    return prompt[:where] + [token] + prompt[where:]


def marked_pair(rng: random.Random, ask: int) -> Pair:
    """Token 3 or 4 somewhere in a prompt that ends with `ask`."""
    prompt = [*body(rng, decoys=8), ask]
    where = rng.randrange(len(prompt))
    return with_token(prompt, where, 3), with_token(prompt, where, 4)


def detector() -> Planted:
    """MLP: a neuron sees token 3 in the last place."""
    p = Planter("seen", "out")
    p.token(3, seen=3.0)
    p.edge("0.mlp.act_in:seen", "0.mlp.post_act:0", 2.0)
    p.bias("0.mlp.post_act:0", -1.0)
    p.edge("0.mlp.post_act:0", "0.mlp.resid_delta:out", 1.0)
    p.bias("0.mlp.resid_delta:out", -2.0)

    def make_pair(rng: random.Random) -> Pair:
        start = body(rng, decoys=2)
        return [*start, 3], [*start, rng.choice(ORDINARY)]

    return p.planted(make_pair)


def plant_conjunction(p: Planter, one: str, other: str) -> None:
    """A neuron of layer 1 that two features, each up to 4, open together only."""
    p.edge(f"1.mlp.act_in:{one}", "1.mlp.post_act:0", 2.0)
    p.edge(f"1.mlp.act_in:{other}", "1.mlp.post_act:0", 2.0)
    p.bias("1.mlp.post_act:0", -7.0)
    p.edge("1.mlp.post_act:0", "1.mlp.resid_delta:out", 2.0)
    p.bias("1.mlp.resid_delta:out", -2.5)


def conjunction() -> Planted:
    """MLPs of two layers: layer 0 sees one feature of the last token, layer 1 that and another."""
    p = Planter("one", "other", "seen", "out")
    p.token(3, one=3.0, other=3.0)
    p.token(4, one=3.0, other=-3.0)
    p.token(5, one=-3.0, other=3.0)
    p.edge("0.mlp.act_in:one", "0.mlp.post_act:0", 1.0)
    p.edge("0.mlp.post_act:0", "0.mlp.resid_delta:seen", 1.5)
    plant_conjunction(p, "seen", "other")

    def make_pair(rng: random.Random) -> Pair:
        start = body(rng, decoys=2)
        return [*start, 3], [*start, rng.choice([4, 5])]

    return p.planted(make_pair)


def quote() -> Planted:
    """A neuron detects either quote, and a head of layer 1 takes its kind to where it closes."""
    p = Planter("double", "single", "kind", "close", "opened", "out")
    p.kinds()
    p.token(3, double=3.0, kind=3.0)
    p.token(4, single=3.0, kind=-3.0)
    p.token(5, close=3.0)
    p.edge("0.mlp.act_in:double", "0.mlp.post_act:0", 1.0)
    p.edge("0.mlp.act_in:single", "0.mlp.post_act:0", 1.0)
    p.edge("0.mlp.post_act:0", "0.mlp.resid_delta:opened", 1.5)
    p.copying_head("1.attn", ask="close", mark="opened", kind="kind", out="out")
    p.idle("1.attn.act_in:kind", "1.attn.q:0", 0.5)  # the last token has no kind
    p.idle("1.attn.act_in:close", "1.attn.k:0", -0.5)  # and is not what it looks for
    return p.planted(lambda rng: marked_pair(rng, ask=5))


def lookup() -> Planted:
    """Attention, then an MLP: the marked token is of kind +, and the last token asks aloud."""
    p = Planter("mark", "kind", "ask", "aloud", "copied", "out")
    p.kinds()
    p.token(3, mark=3.0, kind=3.0)
    p.token(4, mark=3.0, kind=-3.0)
    p.token(5, ask=3.0, aloud=3.0)
    p.token(6, ask=3.0, aloud=-3.0)
    p.copying_head("0.attn", ask="ask", mark="mark", kind="kind", out="copied")
    plant_conjunction(p, "copied", "aloud")
    p.idle("0.attn.act_in:kind", "0.attn.q:0", 0.5)

    def make_pair(rng: random.Random) -> Pair:
        both, only_ask = marked_pair(rng, ask=5)
        return both, only_ask if rng.random() < 0.5 else [*both[:-1], 6]

    return p.planted(make_pair)


def agreement() -> Planted:
    """Grouped queries and a gated MLP: two heads of a group each find a marked token; are they alike?"""
    p = Planter(
        "ask", "mark1", "mark2", "kind", "kind1", "kind2", "out",
        num_key_value_heads=2, head_dim=8, gated_mlp=True, hidden_act="relu", hidden_size=32,
        position_embedding_type="rope", rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    p.kinds()
    for token, features in ((3, {"mark1": 3.0}), (5, {"mark2": 3.0})):
        p.token(token, **features, kind=3.0)
        p.token(token + 1, **features, kind=-3.0)
    p.token(7, ask=3.0)
    p.soften_head(0, 0, 0)
    p.soften_head(0, 1, 0)
    # Channels 3 and 7 of a head turn together, by 0.001 a token: the slowest.
    for query, key, mark in ((3, 3, "mark1"), (15, 7, "mark2")):
        p.edge("0.attn.act_in:ask", f"0.attn.q:{query}", 3.0)
        p.edge(f"0.attn.act_in:{mark}", f"0.attn.k:{key}", 3.0)
    p.edge("0.attn.act_in:kind", "0.attn.v:0", 1.0)
    p.edge("0.attn.v:0", "0.attn.resid_delta:kind1", 2.0, head=0)
    p.edge("0.attn.v:0", "0.attn.resid_delta:kind2", 2.0, head=1)
    p.idle("0.attn.act_in:kind", "0.attn.q:3", 0.5)
    for neuron, sign in ((0, 1.0), (1, -1.0)):
        p.edge("1.mlp.act_in:kind1", f"1.mlp.post_act:{neuron}", 4.0 * sign, gate=True)
        p.bias(f"1.mlp.post_act:{neuron}", -2.0, gate=True)  # or a gate left half open would do
        p.edge("1.mlp.act_in:kind2", f"1.mlp.post_act:{neuron}", 1.0)
        p.edge(f"1.mlp.post_act:{neuron}", "1.mlp.resid_delta:out", 0.5 * sign)

    def make_pair(rng: random.Random) -> Pair:
        prompt, second = [*body(rng, decoys=8), 7], rng.choice([5, 6])
        prompt = with_token(prompt, rng.randrange(len(prompt)), second)
        where, alike = rng.randrange(len(prompt)), second - 2
        return with_token(prompt, where, alike), with_token(prompt, where, 7 - alike)

    return p.planted(make_pair)


def induction() -> Planted:
    """Two heads over two layers: what kind followed the name that stands last?"""
    p = Planter(
        "name", "kind", "before", "out", head_dim=8, rope_layers=[True, False],
        position_embedding_type="rope", rope_parameters={"rope_type": "default", "rope_theta": 10.0},
    )  # fmt: skip
    p.kinds()
    p.token(3, 4, name=3.0)
    p.token(5, 6, name=-3.0)
    p.previous_token_head(0)  # the same on any text, so its q and k are no part of the circuit
    p.edge("0.attn.act_in:name", "0.attn.v:0", 1.0)
    p.edge("0.attn.v:0", "0.attn.resid_delta:before", 1.5)
    p.copying_head("1.attn", ask="name", mark="before", kind="kind", out="out")
    p.idle("1.attn.act_in:kind", "1.attn.q:0", 0.5)

    def make_pair(rng: random.Random) -> Pair:
        asked, others = rng.sample([(3, 4), (5, 6)], 2)
        other_phrase = [rng.choice(others), rng.choice(DECOYS)]
        name, query, kind = rng.choice(asked), rng.choice(asked), rng.choice(DECOYS[::2])
        first, middle, last = (body(rng, decoys=1, least=2, most=3) for _ in range(3))
        is_first = rng.random() < 0.5

        def prompt(kind: int) -> Prompt:
            phrases = [[name, kind], other_phrase]
            one, two = phrases if is_first else phrases[::-1]
            return [*first, *one, *middle, *two, *last, query]

        return prompt(kind), prompt(kind + 1)

    return p.planted(make_pair)


def ranked() -> Planted:
    """AbsTopK at every node, attention and MLP: decoys are marked too, but other channels rank above it."""
    p = Planter("mark", "kind", "ask", "copied", "out", hidden_size=32, activation_frac=0.25)
    p.token(*DECOYS[::2], mark=6.0, kind=7.0)
    p.token(*DECOYS[1::2], mark=6.0, kind=-7.0)
    p.student.embed_tokens.weight[DECOYS.start : DECOYS.stop, 8:16] = 6.5
    p.token(3, mark=1.2, kind=3.0)  # as large as on decoys, once normalised
    p.token(4, mark=1.2, kind=-3.0)
    p.token(5, ask=3.0)
    p.copying_head("0.attn", ask="ask", mark="mark", kind="kind", out="copied")
    p.idle("0.attn.act_in:kind", "0.attn.q:0", 0.5)
    p.edge("1.mlp.act_in:copied", "1.mlp.post_act:0", 2.0)
    p.edge("1.mlp.post_act:0", "1.mlp.resid_delta:out", 1.0)
    p.bias("1.mlp.resid_delta:out", -2.0)
    return p.planted(lambda rng: marked_pair(rng, ask=5))


def outranked() -> Planted:
    """AbsTopK: keys of other heads see some decoys, and rank above the circuit's key there.

    Their input is a node of the circuit, and none of its edges is: it matters that they are large, and not
    what they hold.
    """
    p = Planter("mark", "kind", "ask", "foreign", "out", activation_frac=0.25)
    p.kinds()
    p.token(*DECOYS[4:], mark=5.0, foreign=4.0)
    p.token(3, mark=3.0, kind=3.0)
    p.token(4, mark=3.0, kind=-3.0)
    p.token(5, ask=3.0)
    p.copying_head("0.attn", ask="ask", mark="mark", kind="kind", out="out")
    p.node("0.attn.act_in:foreign")
    for key in range(4, 10):
        p.idle("0.attn.act_in:foreign", f"0.attn.k:{key}", 6.0)
    return p.planted(lambda rng: marked_pair(rng, ask=5))


BUILDERS = {
    build.__name__: build
    for build in (detector, conjunction, quote, lookup, agreement, induction, ranked, outranked)
}
