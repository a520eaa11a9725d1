"""How well a monitor tells the sides of a task apart, beside linear probes at its site, and what it costs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bridges.monitor import Monitor, MonitorConfig
from bridges.readout import (
    auroc,
    auroc_influence,
    auroc_interval,
    auroc_of,
    difference_of_means,
    last_streams,
    logistic_probe,
)
from extractor.errors import UsageError
from extractor.statistics import mean_interval
from extractor.tasks import TaskBatch

TEXT_BLOCKS = 16  # of a forward
Reading = Callable[[Tensor], Tensor]


def measure_monitor(
    monitor: Monitor,
    train: TaskBatch,
    prompts: Mapping[str, TaskBatch],
    text: Int[Tensor, "block seq"],
    config: MonitorConfig,
    seed: int = 0,
) -> dict[str, Any]:
    """AUROC, alarms and cost, beside linear probes of the same site trained on the same prompts.

    Args:
        train: what the nodes were chosen on; the probes are fitted on it.
        prompts: what is measured on, by name (held out, shifted).
        text: held-out text. Nobody knows on which side its tokens are, so the share that raises an alarm is
            no error rate; it tells whether the alarm means something outside the task.
    """
    at_train = last_streams(monitor.dense, train, [monitor.site])[monitor.site]
    probes = {
        "logistic_probe": logistic_probe(at_train, config.probe_ridge),
        "difference_of_means": difference_of_means(at_train),
    }
    site, readings = monitor.site, {"monitor": monitor.of_stream, **probes}
    found: dict[str, Any] = {}
    for name, batch in prompts.items():
        streams = last_streams(monitor.dense, batch, [site])[site][:, None]
        scores = {reading: read(streams)[:, 0] for reading, read in readings.items()}
        found[name] = _on_prompts(scores, batch, monitor.threshold, seed)
        on_clean = {reading: values[: len(batch) // 2] for reading, values in scores.items()}
        found[name]["auroc_against_text"] = _against_text(monitor, readings, on_clean, text)
    alarms = torch.cat([monitor.score(ids) > monitor.threshold for ids in _parts(monitor, text)])
    return {
        "site": str(site),
        "nodes": [str(node) for node in monitor.nodes],
        "threshold": monitor.threshold,
        "false_alarm_rate_calibrated": monitor.false_alarm_rate,
        "auroc_train": auroc(monitor.of_prompts(train)),
        "prompts": found,
        "share_of_text_tokens_with_alarm": alarms.float().mean().item(),
        "cost": cost_per_token(monitor, train.ids[:8]),
    }


def _parts(monitor: Monitor, text: Int[Tensor, "block seq"]) -> tuple[Tensor, ...]:
    return text.to(monitor.dense.device).split(TEXT_BLOCKS)


@torch.no_grad()
def _against_text(
    monitor: Monitor, readings: Mapping[str, Reading], on_clean: Mapping[str, Tensor], text: Tensor
) -> dict[str, float]:
    """Probability that a clean prompt scores above a random token of text, by reading."""
    scores: dict[str, list[Tensor]] = {name: [] for name in readings}
    for ids in _parts(monitor, text):
        stream = monitor.dense.run(ids, record=[monitor.site]).resid[monitor.site].float()
        for name, read in readings.items():
            scores[name].append(read(stream).flatten())
    return {name: auroc_of(on_clean[name], torch.cat(parts)) for name, parts in scores.items()}


def _on_prompts(
    scores: Mapping[str, Tensor], batch: TaskBatch, threshold: float, seed: int
) -> dict[str, Any]:
    half = len(batch) // 2
    clean, corrupted = (scores["monitor"] > threshold).float().chunk(2)
    cluster = batch.cluster[:half]

    def share(values: Tensor) -> dict[str, Any]:
        return mean_interval(values, cluster, bounds=(0.0, 1.0), seed=seed)

    own = auroc_influence(scores["monitor"])
    facts = {
        "auroc": auroc_interval(scores["monitor"], batch, seed),
        "detection_rate": share(clean),
        "false_alarm_rate": share(corrupted),
        "num_prompts": len(batch),
    }
    for name, theirs in scores.items():
        if name != "monitor":
            gap = mean_interval(own - auroc_influence(theirs), cluster, bounds=(-1.0, 1.0), seed=seed)
            facts[name] = {"auroc": auroc_interval(theirs, batch, seed), "monitor_minus_probe": gap}
    return facts


def preceded_by_text(
    batch: TaskBatch, text: Int[Tensor, "block seq"], tokens: int, end_of_text: int, seed: int = 0
) -> TaskBatch:
    """Every pair after a random span of text and the end-of-text token, both sides after the same.

    Raises:
        UsageError: the spans are longer than the blocks.
    """
    if tokens > text.shape[1]:
        raise UsageError(f"monitor: spans of {tokens} tokens cannot be cut from blocks of {text.shape[1]}")
    spans = text.unfold(1, tokens, tokens).flatten(0, 1)
    generator = torch.Generator().manual_seed(seed)
    chosen = spans[torch.randint(len(spans), (len(batch) // 2,), generator=generator)].repeat(2, 1)
    ends = torch.full((len(batch), 1), end_of_text)
    ids = torch.cat([chosen, ends], 1).to(batch.ids)
    rest = (batch.answer, batch.distractor, batch.cluster)
    return TaskBatch(torch.cat([ids, batch.ids], 1), batch.last + tokens + 1, *rest)


@torch.no_grad()
def cost_per_token(monitor: Monitor, ids: Int[Tensor, "batch seq"]) -> dict[str, float]:
    """Floating-point operations of matrix products, counted by torch on whole prompts of this length."""

    def count(run: Callable[[], object]) -> float:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / ids.numel()

    model, width = monitor.dense.model, monitor.dense.width
    stream = torch.zeros(*ids.shape, width, device=ids.device)
    dense = count(lambda: model(ids, use_cache=False))
    own = count(lambda: monitor.of_stream(stream))
    return {
        "monitor_flop": own,
        "linear_probe_flop": 2.0 * width,
        "dense_flop": dense,
        "monitor_share_of_dense": own / dense,
        "tokens_in_prompt": ids.shape[1],
    }
