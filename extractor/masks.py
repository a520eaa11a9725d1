"""Node masks: one gate per node, shared over tokens and prompts, and what a closed node carries.

A node is kept where tau > 0; else it carries its mean over training text (mean ablation), zero, or its
activation at a random token of that text (resample ablation). (Gao et al. 2025, section 2.2, appendix A.5.)
"""

import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from extractor.errors import InputError
from extractor.sites import Node, Recorder, Tap, node_addresses
from extractor.student import Student
from extractor.student_config import StudentConfig

Means = Mapping[str, Float[Tensor, " _"]]
Frozen = Mapping[str, Float[Tensor, "*batch_seq _"]]  # what ablated nodes carry: constants, or one per token
Live = Mapping[str, Int[Tensor, " _"]]  # some channels of every address, ascending


@torch.no_grad()
def mean_activations(student: Student, blocks: Tensor, batch: int = 16) -> dict[str, Tensor]:
    """Mean of every node over all positions of some text, by address."""
    addresses = node_addresses(student.config.num_hidden_layers)
    sums: dict[str, Tensor] = {}
    for ids in blocks.to(student.device).split(batch):
        recorder = Recorder(*addresses)
        student(ids, tap=recorder)
        for address in addresses:
            total = recorder[address].float().sum((0, 1))
            sums[address] = sums[address] + total if address in sums else total
    return {address: total / blocks.numel() for address, total in sums.items()}


def save_means(path: Path, means: Means, facts: Mapping[str, str]) -> None:
    """What ablated nodes carry, beside the circuits that were found with it: it is part of what they are.

    Circuits computed with means of other text are other models, and may not do their task. `facts` (the
    hashes of student and text) go into the file's metadata.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    whole = {address: mean.cpu().contiguous() for address, mean in means.items()}
    save_file(whole, temporary, metadata={"format": "pt", **facts})
    os.replace(temporary, path)


def load_means(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Means and facts of a file of `save_means`.

    Raises:
        InputError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"means '{path}' cannot be read ({error}); recipes/extract.py writes them with the circuits"
        ) from None


class Bank:
    """Every node's activation at random tokens of some text: what resample ablation draws from.

    A token's nodes are drawn together, so what is drawn is a state the student can be in (Chan et al. 2022
    resample over the data set; here over training text, as the means are).
    """

    @torch.no_grad()
    def __init__(
        self, student: Student, blocks: Int[Tensor, "block seq"], per_block: int = 16, seed: int = 0
    ):
        generator = torch.Generator().manual_seed(seed)
        addresses = node_addresses(student.config.num_hidden_layers)
        drawn: dict[str, list[Tensor]] = defaultdict(list)
        for ids in blocks.to(student.device).split(16):
            recorder = Recorder(*addresses)
            student(ids, tap=recorder)
            rows = torch.arange(len(ids))[:, None]
            position = torch.randint(ids.shape[1], (len(ids), per_block), generator=generator)
            for address in addresses:
                drawn[address].append(recorder[address].float()[rows, position].flatten(0, 1))
        self.samples = {address: torch.cat(parts) for address, parts in drawn.items()}
        self.size = len(blocks) * per_block

    def draw(self, batch: int, seq: int, seed: int) -> "Drawn":
        """One random token of the text for every token of a batch."""
        generator = torch.Generator().manual_seed(seed)
        return Drawn(self.samples, torch.randint(self.size, (batch, seq), generator=generator))


class Drawn(Mapping):
    """A bank's activations at drawn tokens, (batch, seq, channel), gathered when they are asked for."""

    def __init__(self, samples: Mapping[str, Tensor], index: Int[Tensor, "batch seq"]):
        self.samples, self.index = samples, index

    def __getitem__(self, address: str) -> Float[Tensor, "batch seq _"]:
        return self.samples[address][self.index]

    def repeat(self, times: int) -> "Drawn":
        """The same draws for a batch repeated so often."""
        return Drawn(self.samples, self.index.repeat(times, 1))

    def __iter__(self):
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)


def live_channels(nodes: Collection[Node]) -> dict[str, Int[Tensor, " _"]]:
    """Kept channels by address, ascending."""
    by_address: dict[str, set[int]] = defaultdict(set)
    for node in nodes:
        by_address[node.address].add(node.channel)
    return {address: torch.tensor(sorted(channels)) for address, channels in by_address.items()}


def ablation_tap(gates: Means, frozen: Frozen) -> Tap:
    """A tap that keeps a node as far as its gate is open; the rest of it is what ablated nodes carry."""

    def tap(address: str, activation: Tensor) -> Tensor:
        if address not in gates:
            return activation
        gate = gates[address]
        return torch.addcmul(frozen[address] * (1 - gate), gate, activation)

    return tap


class NodeMasks:
    """One parameter tau in [-1, 1] per node of the student, for several settings (seeds, tasks) at once.

    With `tied`, a k channel and the q channels it is multiplied with share one: they are one part. `prices`
    are what nodes cost in a circuit; one each, unless given.
    """

    def __init__(
        self,
        means: Means,
        seeds: Sequence[int],
        *,
        init: float = 0.5,
        init_noise: float = 0.3,
        tied: Int[Tensor, " node"] | None = None,
        prices: Float[Tensor, " node"] | None = None,
    ):
        self.means = dict(means)
        device = next(iter(self.means.values())).device
        num_nodes = sum(map(len, self.means.values()))
        self.part_of_node = torch.arange(num_nodes) if tied is None else tied
        num_parts = int(self.part_of_node.max()) + 1
        self.part_of_node = self.part_of_node.to(device)
        self.prices = torch.ones(num_nodes, device=device) if prices is None else prices
        noise = [torch.randn(num_parts, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.tau = (init + init_noise * torch.stack(noise)).clamp(-1, 1).to(device)

    def of_nodes(self, parts: Shaped[Tensor, "*batch part"]) -> Shaped[Tensor, "*batch node"]:
        """Values of parts (tau, gates, choices) as those of nodes."""
        return parts[..., self.part_of_node]

    def live(self, nodes: Bool[Tensor, " node"]) -> dict[str, Int[Tensor, " _"]]:
        """Channels by address of the nodes marked."""
        return {address: kept.nonzero()[:, 0] for address, kept in self.by_address(nodes).items()}

    def by_address(self, values: Shaped[Tensor, " node"]) -> dict[str, Shaped[Tensor, " _"]]:
        """Values of all nodes, cut up by address."""
        sizes = [len(mean) for mean in self.means.values()]
        return dict(zip(self.means, values.split(sizes), strict=True))

    def nodes(self, kept: Bool[Tensor, " node"]) -> frozenset[Node]:
        """The nodes marked."""
        return frozenset(
            Node(address, c) for address, index in self.live(kept).items() for c in index.tolist()
        )


def tied_queries(config: StudentConfig, means: Means) -> Int[Tensor, " node"]:
    """The part of every node where a k channel and the q channels of its group's heads are one part."""
    group = config.num_attention_heads // config.num_key_value_heads
    parts, taken = {}, 0
    for address, mean in means.items():
        if address.endswith(".attn.k"):
            of_head = parts[address[:-1] + "q"].unflatten(0, (-1, group, config.head_dim))
            parts[address] = of_head[:, 0].flatten()
            continue
        width = len(mean) // group if address.endswith(".attn.q") else len(mean)
        part = torch.arange(taken, taken + width)
        taken += width
        if address.endswith(".attn.q"):
            part = part.unflatten(0, (-1, 1, config.head_dim)).expand(-1, group, -1).flatten()
        parts[address] = part
    return torch.cat([parts[address] for address in means])


class GateTap:
    """Gates of several settings over one model; a batch holds the settings' examples one after the other.

    `live` marks the nodes that the model computes (all of a student, the kept ones of a compact model).
    """

    def __init__(self, masks: NodeMasks, live: Bool[Tensor, " node"] | None = None):
        if live is None:
            live = torch.ones_like(masks.part_of_node, dtype=torch.bool)
        self.live = live.nonzero()[:, 0]
        self.means = {address: masks.means[address][kept] for address, kept in masks.live(live).items()}

    def __call__(self, gates: Float[Tensor, "setting node"], drawn: Frozen | None = None) -> Tap:
        """The tap that applies these gates; what is closed carries its mean, or what was drawn for it."""
        sizes = [len(mean) for mean in self.means.values()]
        by_address = dict(zip(self.means, gates[:, self.live].split(sizes, dim=1), strict=True))

        def tap(address: str, activation: Tensor) -> Tensor:
            if address not in by_address:
                return activation
            gate = by_address[address][:, None, None].to(activation.dtype)
            by_setting = activation.unflatten(0, (len(gates), -1))
            frozen = self.means[address]
            if drawn is not None:
                frozen = drawn[address].unflatten(0, (len(gates), -1))
            closed = frozen.to(activation.dtype) * (1 - gate)
            return torch.addcmul(closed, gate, by_setting).flatten(0, 1)

        return tap
