"""What the training loop calls besides models: rate, gradients, metrics, signals, and when to give up."""

import json
import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from tqdm.auto import tqdm

from extractor.artifacts import write_json, write_text
from extractor.config import Config
from extractor.errors import DivergedError, StoppedError
from extractor.machine import whole


class OptimizerConfig(Config):
    """AdamW, its rate over the run, and what happens to gradients before a step."""

    learning_rate: float = Field(4e-3, gt=0)
    """The highest rate; with `sharkfin`, the highest at the final density."""
    warmup_steps: int = Field(20, ge=0)
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up, down to `end_factor` of the rate."""
    end_factor: float = Field(0.05, ge=0, le=1)
    sharkfin: bool = False
    """Multiply the rate by sqrt(final density / density), as the paper does (appendix A.2)."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    gradient_control: Literal["clip_norm", "clip_rms", "normalise_rms", "none"] = "clip_norm"
    """Clip the norm to `max_grad_norm`; or the RMS to 1 (the paper's text); or divide by the RMS at every
    step (its released code)."""
    max_grad_norm: float = Field(1.0, gt=0)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over what is trained, fused: six times as fast on a CPU, and `Watch.step` needs it."""
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(step: int, num_steps: int, config: OptimizerConfig, density: float, target: float) -> float:
    """The rate of a step (counted from 0) at which the weights have this density."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = step / max(1, num_steps)
    if config.lr_schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    left = 1.0 if config.lr_schedule == "constant" else 1 - (1 - config.end_factor) * progress
    fin = math.sqrt(target / density) if config.sharkfin else 1.0
    return config.learning_rate * min(warm, left) * fin


def control_gradients_(
    accelerator: Accelerator, parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> Float[Tensor, ""]:
    """Clip or normalise the gradients of all processes alike; returns their norm before, on the device.

    After the gradients' reduction a NaN on one process is a NaN on all, so all see the same norm. One that
    is not finite spoils the gradients; `Watch.step` leaves them out.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    limit = config.max_grad_norm if config.gradient_control == "clip_norm" else math.inf
    norm = whole(accelerator.clip_grad_norm_(parameters, limit))
    rms = norm / math.sqrt(sum(parameter.numel() for parameter in parameters))
    scale = 1 / (rms + 1e-5)
    if config.gradient_control == "clip_rms":
        scale = scale.clamp(max=1.0)
    if config.gradient_control in ("normalise_rms", "clip_rms"):
        torch._foreach_mul_([parameter.grad for parameter in parameters], scale)
    return norm


class MetricsFile:
    """metrics.jsonl: one line per logged step, none missing and none twice after a resume."""

    def __init__(self, path: Path, first_step: int, *, is_writer: bool):
        self.path, self.is_writer = path, is_writer
        if is_writer:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
            whole = [line for line in lines if line.endswith("\n")]  # a kill may have torn the last one
            kept = [line for line in whole if json.loads(line)["step"] <= first_step]
            write_text(path, "".join(kept))

    def write(self, row: dict[str, float]) -> None:
        if self.is_writer:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")


class StopSignals:
    """SIGTERM and Ctrl-C end a run after its step, with a checkpoint; a second one ends it at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: signal.Signals | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def asked(self) -> bool:
        """Whether any process was asked to stop: a collective call with several processes."""
        if self.accelerator.num_processes == 1:
            return self.received is not None
        mine = torch.tensor(int(self.received is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(mine, reduction="sum"))

    def stop(self, step: int) -> None:
        """Raises StoppedError with the exit code of what was received."""
        number = self.received or signal.SIGTERM
        code = 130 if number == signal.SIGINT else 75
        raise StoppedError(
            f"stopped by {number.name} after step {step}; the same command goes on from there", code
        )


class WatchConfig(Config):
    """When a run is given up."""

    max_skipped: int = Field(10, ge=0)
    """Steps in a row that may be skipped because a gradient is not finite."""
    max_ce_ratio: float = Field(3.0, gt=1)
    """A text loss this many times its recent median ends the run as diverged."""


class Watch:
    """Leaves out steps whose gradients are not finite, and gives up on a run that does not come back.

    Whether a step is taken is decided on the device, which also counts; the host reads the counts when it
    logs, so no step waits for the device.
    """

    def __init__(self, run: Path, config: WatchConfig, *, is_writer: bool):
        self.run, self.config, self.is_writer = run, config, is_writer
        self.in_a_row: Tensor | int = 0
        self.most_in_a_row: Tensor | int = 0
        self.recent: deque[float] = deque(maxlen=50)

    def step(self, optimizer: torch.optim.Optimizer | AcceleratedOptimizer, norm: Float[Tensor, ""]) -> None:
        """An optimiser step, which changes nothing where the gradients' norm is not finite.

        Raises:
            ValueError: an optimiser without `fused=True`, which cannot leave a step out by itself.
        """
        inner = getattr(optimizer, "optimizer", optimizer)
        if not all(group["fused"] for group in inner.param_groups):
            raise ValueError("the optimiser must be made with fused=True")
        skipped = norm.detach().isfinite().logical_not()
        self.in_a_row = (self.in_a_row + 1) * skipped
        self.most_in_a_row = self.in_a_row.clamp(min=self.most_in_a_row)
        inner.found_inf = skipped.float()  # torch's fused optimisers ask for it, as its GradScaler sets it
        optimizer.step()

    def check_skipped(self, step: int, norm: Tensor, losses: dict[str, Tensor]) -> int:
        """How many steps in a row were left out just now; waits for the device.

        Raises:
            DivergedError: at some time since the start, more in a row than allowed.
        """
        now, most = int(self.in_a_row), int(self.most_in_a_row)
        if most > self.config.max_skipped:
            values = {name: float(loss.detach()) for name, loss in losses.items()}
            why = f"loss is not finite (gradient norm {float(norm)}, {most} steps in a row)"
            self._give_up(step, why, values)
        return now

    def check(self, step: int, row: dict[str, float]) -> None:
        """Raises DivergedError: the text loss is far above what it was, or not finite."""
        usual = statistics.median(self.recent) if len(self.recent) >= 5 else math.inf
        if not all(map(math.isfinite, row.values())):
            self._give_up(step, "loss is not finite", row)
        if row["ce"] > self.config.max_ce_ratio * usual:
            self._give_up(step, f"ce is {row['ce']:.2f} nats/token, its median was {usual:.2f}", row)
        self.recent.append(row["ce"])

    def _give_up(self, step: int, why: str, values: dict[str, float]) -> None:
        if self.is_writer:
            shown = {name: repr(value) for name, value in values.items()}  # NaN is no JSON
            write_json(self.run / "diverged.json", {"step": step, "why": why, "values": shown})
        raise DivergedError(
            f"step {step}: {why}; the last checkpoint is whole, lower learning_rate (diverged.json has more)"
        )


class Meter:
    """The progress bar: the losses, tokens a second since this start."""

    def __init__(self, accelerator: Accelerator, first_step: int, num_steps: int, tokens_per_step: int):
        self.first_step, self.tokens_per_step = first_step, tokens_per_step
        self.bar = tqdm(
            range(first_step, num_steps),
            desc="train",
            initial=first_step,
            total=num_steps,
            disable=not accelerator.is_main_process,
            mininterval=2,
        )
        self.started = time.monotonic()

    def steps(self) -> Iterator[int]:
        return iter(self.bar)

    def show(self, step: int, row: dict[str, float]) -> None:
        seconds = (time.monotonic() - self.started) / (step - self.first_step)
        self.bar.set_postfix(
            kl=f"{row['kl']:.3f}",
            ce=f"{row['ce']:.3f}",
            density=f"{row['density']:.3f}",
            tok_s=f"{self.tokens_per_step / seconds:.0f}",
            refresh=False,
        )


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def mean_over_processes(losses: dict[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
    reduced = accelerator.reduce(torch.stack(list(losses.values())), reduction="mean").tolist()
    return dict(zip(losses, reduced, strict=True))
