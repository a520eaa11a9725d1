"""Watching the dense model through a circuit: the bridge's encoder reads its nodes as the model runs.

    monitor = Monitor.fit(dense, student, bridges, circuit, train, calibration, MonitorConfig())
    with monitor.watching() as watch:
        dense.model.generate(**prompts)
    watch.alarms                               # (batch, seq), one per token read so far

What is watched is which side of the task's pair a prompt is on: the score is high on clean prompts, low on
corrupted ones, at the prompt's last position. Nodes are read by one bridge, without the student; each has the
sign and the scale that training prompts give it, nothing else is fitted. The threshold is conformal:
a corrupted prompt drawn as the calibration prompts were passes it with at most the stated false alarm rate.

Beam search reorders the model's cache, which scores of earlier tokens do not follow.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.dense import DenseModel
from bridges.edit import Hashes
from bridges.hooks import hooked
from bridges.reading import BridgeReader, ReadSettings
from bridges.readout import auroc, last_streams, separation
from extractor.artifacts import SCHEMA_VERSION, read_json, replace_folder, write_json
from extractor.circuit import Circuit
from extractor.config import Config
from extractor.errors import InputError
from extractor.positions import PromptPositions
from extractor.sites import Node, Site
from extractor.student import Student
from extractor.tasks import TaskBatch


class MonitorConfig(Config):
    """How a monitor is made from a circuit."""

    max_nodes: int = Field(4, ge=1)
    """Most nodes that are read; all at one site."""
    false_alarm_rate: float = Field(0.05, gt=0, lt=1)
    """Share of corrupted prompts, drawn as the calibration prompts were, that may raise an alarm."""
    probe_ridge: float = Field(1.0, gt=0)
    """Penalty of the logistic probe that the monitor is compared with."""


@dataclass(frozen=True)
class MonitorHashes(Hashes):
    """SHA-256 of what a monitor belongs to."""

    circuit_sha256: str = "none"


@dataclass(frozen=True)
class Monitor:
    """Nodes read at one site of one dense model, their weights, and a threshold."""

    dense: DenseModel
    reader: BridgeReader
    nodes: tuple[Node, ...]
    weights: Float[Tensor, " node"]
    threshold: float
    false_alarm_rate: float
    task: str = ""
    hashes: MonitorHashes = MonitorHashes()

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        dense: DenseModel,
        student: Student,
        bridges: BridgeSet,
        circuit: Circuit,
        train: TaskBatch,
        calibration: TaskBatch,
        config: MonitorConfig,
        hashes: MonitorHashes = MonitorHashes(),  # noqa: B008  frozen
    ) -> "Monitor":
        """Site and nodes by their AUROC on training prompts, the threshold on other prompts.

        Raises:
            InputError: the circuit has no residual channel, or too few prompts for the false alarm rate.
        """
        channels = {site: channels_at(site, circuit, dense.is_parallel) for site in bridges.sites}
        sites = [site for site in bridges.sites if channels[site]]
        if not sites:
            raise InputError(f"monitor: the circuit of '{circuit.task}' has no residual channel at any site")
        best = None
        for site, streams in last_streams(dense, train, sites).items():
            reader = BridgeReader.of(student, bridges, [site], {})
            reads = reader.read(site, streams[:, None])[site.read_address][:, 0]
            chosen, weights, score = _grow(reads, channels[site], config.max_nodes)
            if best is None or score > best[0]:
                best = score, reader, [Node(site.read_address, c) for c in chosen], weights
        _, reader, nodes, weights = best
        monitor = cls(
            dense, reader, tuple(nodes), weights, 0.0, config.false_alarm_rate, circuit.task, hashes
        )
        threshold = conformal_threshold(monitor.of_prompts(calibration), config.false_alarm_rate)
        return cls(**{**vars(monitor), "threshold": threshold})

    @property
    def site(self) -> Site:
        (site,) = self.reader.sites
        return site

    def of_stream(self, resid: Float[Tensor, "batch seq d_dense"]) -> Float[Tensor, "batch seq"]:
        """Scores from the dense stream at the monitor's site."""
        reads = self.reader.read(self.site, resid)[self.site.read_address]
        return reads[..., [node.channel for node in self.nodes]] @ self.weights

    def score(self, input_ids: Int[Tensor, "batch seq"], **inputs: Tensor) -> Float[Tensor, "batch seq"]:
        """Scores at every token of a batch."""
        with self.watching() as watch, torch.no_grad():
            self.dense.model(input_ids, use_cache=False, **inputs)
        return watch.scores

    def of_prompts(self, batch: TaskBatch) -> Float[Tensor, " example"]:
        """Scores at each prompt's last position."""
        streams = last_streams(self.dense, batch, [self.site])[self.site]
        return self.of_stream(streams[:, None])[:, 0]

    @contextmanager
    def watching(self) -> Iterator["Watch"]:
        """Read every forward of the Hugging Face model; no weight and no activation is touched."""
        watch, block = Watch(self), self.dense.blocks[self.site.layer]
        is_mid = self.site.stream == "resid_mid"
        module = block.get_submodule(self.dense.layout.mid) if is_mid else block
        with ExitStack() as stack:
            before = self.dense.model.register_forward_pre_hook(watch.begin, with_kwargs=True)
            stack.enter_context(hooked(before))
            stack.enter_context(hooked(module.register_forward_pre_hook(watch.at_site)))
            yield watch

    def save(self, folder: Path, facts: Mapping[str, object]) -> None:
        """Write monitor.json, with `facts`, and monitor.safetensors."""
        header = {
            "schema_version": SCHEMA_VERSION,
            "task": self.task,
            "site": str(self.site),
            "nodes": [str(node) for node in self.nodes],
            "weights": self.weights.tolist(),
            "threshold": self.threshold,
            "false_alarm_rate": self.false_alarm_rate,
            "reader": self.reader.settings_json(),
            **asdict(self.hashes),
            **facts,
        }
        tensors = {f"reader.{name}": t.cpu().contiguous() for name, t in self.reader.tensors.items()}
        tensors["weights"] = self.weights.cpu()

        def write(target: Path) -> None:
            save_file(tensors, target / "monitor.safetensors", metadata={"format": "pt"})
            write_json(target / "monitor.json", header)

        replace_folder(folder, write)

    @classmethod
    def load(cls, folder: Path, dense: DenseModel) -> "Monitor":
        """Read a monitor made for this dense checkpoint.

        Raises:
            InputError: missing or damaged files, or another base checkpoint.
        """
        header = read_json(folder / "monitor.json", "monitor", "recipes/transfer.py")
        if header.get("dense_sha256") != dense.sha256:
            raise InputError(
                f"monitor '{folder}' was made for a dense checkpoint with weights "
                f"{str(header.get('dense_sha256'))[:12]}, this one has {dense.sha256[:12]}"
            )
        try:
            tensors = load_file(folder / "monitor.safetensors", device=str(dense.device))
            weights = tensors.pop("weights")
            of_reader = {name.removeprefix("reader."): tensor for name, tensor in tensors.items()}
            return cls(
                dense=dense,
                reader=BridgeReader(ReadSettings(**header["reader"]), of_reader),
                nodes=tuple(Node.parse(name) for name in header["nodes"]),
                weights=weights,
                threshold=header["threshold"],
                false_alarm_rate=header["false_alarm_rate"],
                task=header["task"],
                hashes=MonitorHashes(*(header[name] for name in vars(MonitorHashes()))),
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"monitor '{folder}' is damaged ({error!r}); make it again") from None


class Watch:
    """Scores of the text that the model has read, token by token, and the alarms they raise."""

    def __init__(self, monitor: Monitor):
        self.monitor, self.positions = monitor, PromptPositions()
        self.scores: Float[Tensor, "batch seq"] = torch.zeros(0, 0)
        self.is_text: Bool[Tensor, "batch seq"] = torch.zeros(0, 0, dtype=torch.bool)
        """False at padding, by the attention mask; it raises no alarm."""

    @property
    def alarms(self) -> Bool[Tensor, "batch seq"]:
        return (self.scores > self.monitor.threshold) & self.is_text

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a forward: where it starts, and which of its tokens are text."""
        self.positions(module, args, kwargs)
        start, mask = self.positions.start, kwargs.get("attention_mask")
        if start != 0 and start != self.scores.shape[1]:
            raise InputError(
                "the monitor has not seen the tokens in the model's cache; enter watching() before the prompt"
            )
        self.mask = mask[:, start:].bool() if mask is not None and mask.ndim == 2 else None

    @torch.no_grad()
    def at_site(self, module: nn.Module, args: tuple) -> None:
        resid = args[0].reshape(-1, self.positions.length, args[0].shape[-1])  # OPT flattens it
        scores = self.monitor.of_stream(resid)
        is_text = torch.ones_like(scores, dtype=torch.bool) if self.mask is None else self.mask
        if self.positions.start:
            scores = torch.cat([self.scores, scores], 1)
            is_text = torch.cat([self.is_text, is_text], 1)
        self.scores, self.is_text = scores, is_text


def channels_at(site: Site, circuit: Circuit, is_parallel: bool) -> list[int]:
    """Stream channels that the circuit reads at a site, or has written in the sublayer before it."""
    addresses = {site.read_address}
    if site.stream == "resid_mid":
        addresses.add(f"{site.layer}.attn.resid_delta")
    else:
        addresses.add(f"{site.layer - 1}.mlp.resid_delta")
        if is_parallel:
            addresses.add(f"{site.layer - 1}.attn.resid_delta")
    return sorted({node.channel for node in circuit.nodes if node.address in addresses})


def conformal_threshold(scores: Float[Tensor, " example"], false_alarm_rate: float) -> float:
    """A score that a further corrupted prompt passes with at most this probability.

    The ceil((n + 1)(1 - rate))-th smallest of the n corrupted prompts' scores (split conformal); where clean
    prompts are beyond it, half way to the score that as many of them reach.

    Raises:
        InputError: too few prompts for the rate.
    """
    clean, corrupted = (side.sort().values for side in scores.chunk(2))
    rank = math.ceil((len(corrupted) + 1) * (1 - false_alarm_rate) - 1e-9)
    if rank > len(corrupted):
        least = math.ceil(1 / false_alarm_rate - 1 - 1e-9)
        raise InputError(
            f"monitor.false_alarm_rate {false_alarm_rate:g} needs at least {least} calibration pairs, "
            f"there are {len(corrupted)}"
        )
    passed_by_few = corrupted[rank - 1].item()
    reached_by_most = clean[len(clean) - rank].item()
    return max(passed_by_few, (passed_by_few + reached_by_most) / 2)


def _grow(
    reads: Float[Tensor, "example channel"], channels: list[int], most: int
) -> tuple[list[int], Float[Tensor, " node"], tuple[float, float]]:
    """Channels added greedily while AUROC rises; of equals, that with the widest gap between the sides.

    A channel's weight is its sign over its standard deviation within a side. Returns channels, weights,
    and the AUROC with the gap in standard deviations.
    """
    weight = {c: _weight(reads[:, c]) for c in channels}
    chosen: list[int] = []
    best = (0.0, 0.0)
    while len(chosen) < min(most, len(channels)):
        tried = {}
        for channel in channels:
            if channel not in chosen:
                score = sum(weight[c] * reads[:, c] for c in [*chosen, channel])
                tried[channel] = (round(auroc(score), 6), separation(score))
        channel = max(tried, key=lambda c: tried[c])
        if chosen and tried[channel][0] <= best[0]:
            break
        best = tried[channel]
        chosen.append(channel)
    return chosen, torch.stack([weight[c] for c in chosen]), best


def _weight(read: Float[Tensor, " example"]) -> Float[Tensor, ""]:
    """Sign of the gap between the sides over the standard deviation within one; 0 for a constant."""
    clean, corrupted = read.chunk(2)
    within = ((clean.var(correction=0) + corrupted.var(correction=0)) / 2).sqrt()
    gap = clean.mean() - corrupted.mean()
    scale = within.clamp(min=1e-3 * gap.abs())
    return torch.where(scale > 0, gap.sign() / scale, 0.0)
