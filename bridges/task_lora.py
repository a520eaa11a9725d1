"""A LoRA trained to flip a task's answers: the plain way to get what an edit gets.

PEFT's own layer on the module that writes to the stream before a site, of an edit's rank, trained by Adam on
the prompts of one direction to answer their distractors. It changes the stream at the site and nothing before
it, by a delta that is linear in its scale, so its indirect effect is defined as that of an edit is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bridges.dense import DenseModel
from bridges.flip_curves import inside, select_prompts
from bridges.hooks import Reached, hooked
from bridges.low_rank import writer_before
from bridges.steering import Direction, half
from bridges.tails import PromptTails
from extractor.config import Config
from extractor.sites import Site

ADAPTER = "default"


class TaskLoraConfig(Config):
    """The budget of the trained LoRA."""

    steps: int = Field(30, ge=0)
    """Adam steps; 0 leaves it at its start, where it adds nothing."""
    prompts_per_step: int = Field(8, ge=1)
    learning_rate: float = Field(0.01, gt=0)


class TaskLora:
    """A LoRA on the module that writes to the stream before a site.

    Raises:
        InputError: the family has no such module, or a norm follows it (`bridges.low_rank.writer_before`).
    """

    def __init__(self, dense: DenseModel, site: Site, rank: int, seed: int = 0):
        from peft import LoraConfig, inject_adapter_in_model  # slow to import

        self.dense, self.site, self.rank = dense, site, rank
        self.writer = writer_before(dense, site)
        # of the module's own output; an embedding's `gain` also holds what its output was multiplied by
        self.gain = self.writer.gain / float(getattr(self.writer.module, "embed_scale", 1.0))
        holder = nn.ModuleDict({"writer": self.writer.module})
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,  # a scale of 1
            lora_dropout=0.0,
            target_modules=["writer"],
            fan_in_fan_out=isinstance(self.writer.module, Conv1D),
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(config, holder)
        self.layer: nn.Module = holder["writer"]
        self.losses: list[float] = []

    def parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.layer.named_parameters() if "lora_" in name]

    @torch.no_grad()
    def inputs(self, ids: Int[Tensor, "batch seq"]) -> Tensor:
        """What the module reads: (batch, seq, channel), token ids for an embedding."""

        def stop(module: nn.Module, args: tuple) -> None:
            raise Reached(args[0])

        with hooked(self.writer.module.register_forward_pre_hook(stop)):
            try:
                self.dense.run(ids, record=False)
            except Reached as reached:
                read = reached.resid
                return read if self.writer.is_embedding else read.view(*ids.shape, -1)
        raise AssertionError(f"the dense model never reached {self.writer.name}")

    def delta(self, inputs: Tensor) -> Float[Tensor, "batch seq d_dense"]:
        """What it adds to the stream at the site, at scale 1."""
        return self.gain * (self.layer(inputs) - self.writer.module(inputs)).float()

    @contextmanager
    def installed(self, scale: float = 1.0) -> Iterator[nn.Module]:
        """The dense model with the adapter in it, at a scale; afterwards it is as it was."""
        parent_name, _, name = self.writer.name.rpartition(".")
        parent = self.dense.model.get_submodule(parent_name)
        self.layer.set_scale(ADAPTER, scale)
        setattr(parent, name, self.layer)
        try:
            yield self.dense.model
        finally:
            setattr(parent, name, self.writer.module)
            self.layer.set_scale(ADAPTER, 1.0)


def train_lora(
    tails: PromptTails,
    site: Site,
    rank: int,
    direction: Direction,
    config: TaskLoraConfig,
    seed: int = 0,
) -> TaskLora:
    """Train on one half of the training prompts, towards their distractors (two-way cross-entropy)."""
    lora = TaskLora(tails.dense, site, rank, seed)
    edited = select_prompts(tails, half(tails.batch, direction), [site])
    edited.prefix = None  # the short way has no gradient of what comes early, and takes an untrained LoRA
    inputs = lora.inputs(edited.batch.ids)
    optimizer = torch.optim.Adam(lora.parameters(), lr=config.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(config.steps):
        while len(order) < config.prompts_per_step:
            order += torch.randperm(len(inputs), generator=generator).tolist()
        rows = torch.tensor(order[: config.prompts_per_step], device=inputs.device)
        del order[: config.prompts_per_step]
        some = select_prompts(edited, rows, [site])
        with torch.enable_grad():
            delta = lora.delta(inputs[rows, : some.batch.ids.shape[1]]) * inside(some.batch)
            loss = F.softplus(some.differences(site, delta)[0]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lora.losses.append(loss.item())
    for parameter in lora.parameters():
        parameter.requires_grad_(False)
    return lora
