"""Dense model and student without weights, from config.json alone: on torch's meta device.

Parameters can be counted, and a config that training would refuse is refused; nothing can be run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bridges.families import Family, family_of
from bridges.hub import resolve_folder
from bridges.trust import DenseConfig, check_folder
from bridges.warm_start import StudentShape, start_config
from extractor.errors import InputError
from extractor.sites import Site, sites
from extractor.sparsity import SparsityConfig, WeightSparsifier
from extractor.student import Student, StudentConfig
from extractor.widen import widen


@dataclass(frozen=True)
class Skeleton:
    """A dense model without weights: what decides its student's config, and its sites."""

    model: PreTrainedModel
    family: Family
    config: Any
    blocks: nn.ModuleList
    final_norm: nn.Module
    is_parallel: bool

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def sites(self) -> tuple[Site, ...]:
        return sites(len(self.blocks), parallel=self.is_parallel)


def skeleton(folder: Path) -> Skeleton:
    """The dense model that a folder's config.json describes, on the meta device.

    Raises:
        InputError: a config that is refused (see `bridges.trust`), or that transformers cannot build.
    """
    described = DenseConfig(path=str(folder.absolute()), random_weights=True)
    check_folder(resolve_folder(described), described)  # the hub cache's folders hold links, and may
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # what a config of someone else can raise is anything
        line = " ".join(str(error).split())[:300]
        raise InputError(f"transformers cannot build '{folder}' from its config.json: {line}") from error
    family = family_of(model)
    return Skeleton(
        model=model,
        family=family,
        config=model.config,
        blocks=model.get_submodule(family.layout.blocks),
        final_norm=model.get_submodule(family.layout.final_norm),
        is_parallel=family.layout.is_parallel(model.config),
    )


def empty_student(dense: Skeleton, shape: StudentShape) -> tuple[Student, StudentConfig]:
    """The student without weights, and the config of one that is the dense model's exact copy."""
    config = start_config(dense, shape)
    with torch.device("meta"):
        student = Student(config)
        if shape.start == "copy":
            student = widen(
                student,
                hidden_size=shape.hidden_size,
                intermediate_size=shape.intermediate_size,
                num_attention_heads=shape.num_attention_heads,
            )
    return student, start_config(dense, StudentShape(start=shape.start))


def num_parameters(model: nn.Module) -> int:
    """Tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_nonzeros(student: Student, sparsity: SparsityConfig) -> int:
    """Of the trained student: exactly k in every sparse parameter, and every other parameter whole.

    Raises:
        InputError: a floor of weights per neuron that a matrix has no room for.
    """
    parameters = dict(student.named_parameters())
    sparsifier = WeightSparsifier(parameters, sparsity, num_steps=1)
    return sum(
        sparsifier.num_kept(name, 1) if name in sparsifier.parameters else parameter.numel()
        for name, parameter in parameters.items()
    )
