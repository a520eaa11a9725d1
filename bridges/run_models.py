"""What a finished run folder holds for those who compare both models: loaded once, checked once.

The dense model is always the unquantised one: an edit is one of the model itself, so it is chosen and
measured in full precision.
"""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.checkpoint import DenseConfig, check_same_tokenizer
from bridges.crossing import Source
from bridges.dense import DenseModel
from bridges.edit import Hashes
from bridges.streams import PromptStreams
from extractor.artifacts import fingerprint, read_json
from extractor.circuit import Circuit
from extractor.data import DataConfig, TokenBlocks, load_blocks, load_spread
from extractor.errors import InputError
from extractor.masks import load_means
from extractor.student import load_student
from extractor.task_specs import PAPER_TASKS
from extractor.tasks import Pair, TaskBatch, encode_pairs, make_pairs, refuse_unknown_tasks, task_label

Split = Literal["train", "selection", "held_out"]
TextBlocks = tuple[Int[Tensor, "block token"], Int[Tensor, "block token"] | None]


class RunModels:
    """Dense model, student, bridges and circuits of a run.

    Raises:
        InputError: circuits or bridges that belong to other weights, another tokenizer.
    """

    def __init__(
        self,
        run: Path,
        dense: DenseConfig,
        device: torch.device,
        seed: int = 0,
        *,
        needs_circuits: bool = True,
    ):
        self.run, self.seed = run, seed
        self.circuits = load_circuits(run) if needs_circuits or any(circuit_files(run)) else {}
        self.dense = DenseModel.from_pretrained(dense, device=device, plain=True)
        self.student, self.tokenizer = load_student(run / "student", device)
        self.student.requires_grad_(False)
        check_same_tokenizer(self.tokenizer, str(run / "student"), self.dense.tokenizer, self.dense.name)
        self.bridges = BridgeSet.from_pretrained(run / "bridges").to(device)
        self.hashes = check_hashes(run, self.dense, self.circuits.values())

    def chosen(self, tasks: tuple[str, ...]) -> list[Circuit]:
        """The circuits of these tasks, or all.

        Raises:
            InputError: a task without a circuit.
        """
        if missing := [task for task in tasks if task not in self.circuits]:
            raise InputError(
                f"tasks: no circuit of '{missing[0]}' in '{self.run / 'circuits'}'; there are "
                f"{', '.join(sorted(self.circuits))}"
            )
        return [self.circuits[task] for task in tasks or sorted(self.circuits)]

    def with_empty(self, tasks: tuple[str, ...]) -> list[Circuit]:
        """The circuits of these tasks, an empty one where there is none; no tasks: the run's, or the paper's.

        An empty circuit has the task's prompts and no nodes: for what needs a task and no circuit.

        Raises:
            UsageError: a name that is neither a circuit's nor a task's.
        """
        names = {task_label(name): name for name in tasks or sorted(self.circuits) or PAPER_TASKS}
        refuse_unknown_tasks([name for label, name in names.items() if label not in self.circuits])
        sha256 = self.hashes.student_sha256
        return [
            self.circuits.get(label) or Circuit(label, frozenset(), (), sha256, {"prompts": name})
            for label, name in names.items()
        ]

    @cached_property
    def means(self) -> dict[str, Tensor]:
        """What ablated nodes carried when the circuits were found, by address.

        Raises:
            InputError: missing, or not those of this student or of every circuit.
        """
        path = self.run / "circuits" / "means.safetensors"
        means, facts = load_means(path, self.dense.device)
        for circuit in self.circuits.values():
            own = circuit.hashes.get("train_text_sha256", facts.get("train_text_sha256"))
            stated = facts.get("student_sha256"), facts.get("train_text_sha256")
            if stated != (circuit.student_sha256, own):
                raise InputError(
                    f"circuit '{circuit.task}' was found with other means than those in '{path}'; "
                    "recipes/extract.py finds it again"
                )
        return means

    def carried(self, circuit: Circuit) -> dict[str, Tensor]:
        """What the circuit's closed nodes carry: means, or zeros where it was found with those."""
        if circuit.settings.get("ablation") == "zero":
            return {address: torch.zeros_like(mean) for address, mean in self.means.items()}
        return self.means

    def pairs(self, circuit: Circuit, split: Split, count: int) -> list[Pair]:
        limit = self.student.config.max_position_embeddings
        task = str(circuit.settings["prompts"])
        return make_pairs(task, self.tokenizer, split=split, count=count, seed=self.seed, max_tokens=limit)

    def prompts(self, circuit: Circuit, split: Split, count: int) -> TaskBatch:
        return encode_pairs(self.pairs(circuit, split, count), self.tokenizer).to(self.dense.device)

    def text(self, data: DataConfig, split: Literal["train", "held_out"], count: int) -> TextBlocks:
        """Blocks from many files, and where documents are kept apart their positions."""
        ids, position_ids = load_spread(data, self.tokenizer, split, count).sample(count)
        return ids.to(self.dense.device), position_ids

    def streams(self, batch: TaskBatch, source: Source = "student") -> PromptStreams:
        return PromptStreams(self.dense, self.student, self.bridges, batch, source=source)


def run_text(
    data: DataConfig, dense: DenseModel, max_train_tokens: int, eval_blocks: int
) -> tuple[TokenBlocks, TokenBlocks]:
    """Training and held-out blocks of a run; no held-out block is also a training block."""
    if data.separate_documents:
        dense.check_documents_apart()
    limits = {"max_context": getattr(dense.config, "max_position_embeddings", None)}
    train = load_blocks(data, dense.tokenizer, "train", max_tokens=max_train_tokens, **limits)
    wanted = eval_blocks * data.context_length
    held_out = load_blocks(data, dense.tokenizer, "held_out", max_tokens=wanted, apart_from=train, **limits)
    return train, held_out


def circuit_files(run: Path) -> list[Path]:
    return sorted((run / "circuits").glob("*.json"))


def extraction_of(run: Path) -> dict[str, Any]:
    """The settings that the run's circuits were found with.

    Raises:
        InputError: the manifest does not tell.
    """
    manifest = read_json(run / "manifest.json", "manifest", "recipes/extract.py")
    if "extract" not in manifest:
        raise InputError(f"'{run / 'manifest.json'}' says nothing of recipes/extract.py; run it in '{run}'")
    return manifest["extract"]["config"]


def load_circuits(run: Path) -> dict[str, Circuit]:
    """All circuits of a run, by task.

    Raises:
        InputError: there are none.
    """
    circuits = [Circuit.load(path) for path in circuit_files(run)]
    if not circuits:
        raise InputError(f"no circuits in '{run / 'circuits'}'; recipes/extract.py writes them")
    return {circuit.task: circuit for circuit in circuits}


def check_hashes(run: Path, dense: DenseModel, circuits: Iterable[Circuit]) -> Hashes:
    """The weights everything belongs to; circuits or bridges of other weights are refused."""
    student_sha256 = fingerprint(run / "student")
    for circuit in circuits:
        if circuit.student_sha256 != student_sha256:
            raise InputError(
                f"circuit '{circuit.task}' belongs to a student with weights "
                f"{circuit.student_sha256[:12]}, this run has {student_sha256[:12]}; extract it again"
            )
    header = read_json(run / "bridges" / "bridges.json", "bridges", "recipes/train.py")
    if header["dense_sha256"] != dense.sha256:
        raise InputError(
            f"the bridges in '{run}' were trained on a dense checkpoint with weights "
            f"{header['dense_sha256'][:12]}, '{dense.name}' has {dense.sha256[:12]}"
        )
    return Hashes(dense.sha256, student_sha256, fingerprint(run / "bridges"))
