"""The intervention desk, recorded: what student and dense model answer when one node of a circuit is changed.

For each node and setting, on a few held-out prompts: answer minus distractor (logits) and the most likely
next token, of the student with the node changed and of the dense model with that change carried over the
bridge, as a live edit does it. In the student only the sublayer that reads a read node sees it moved; in the
dense model the stream is moved, so everything after does.

    prompts    text, answer and distractor of each prompt: clean sides, then corrupted ones
    tokens     every next token that was most likely somewhere; `*_top` point into it
    settings   what the node goes to, and how far: 0 its own value, 1 the target, 2 as far again
    unedited   the models as they are, per prompt
    nodes      those whose patch moves the student's answers most, in that order
    student, dense, student_top, dense_top   [node][setting][prompt]
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bridges.bridge import BridgeSet
from bridges.dense import DenseModel
from bridges.edit import Edit
from bridges.live import LiveEdit
from extractor.circuit import Circuit
from extractor.config import Config
from extractor.errors import InputError
from extractor.intervention import Intervention, ablate, patch
from extractor.masks import Means
from extractor.sites import Node, Recorder
from extractor.statistics import undefined
from extractor.student import Student
from extractor.tasks import Pair, TaskBatch, encode_pairs

SETTINGS = (
    ("the counterfactual's value", 0.5),
    ("the counterfactual's value", 1.0),
    ("the counterfactual's value", 2.0),
    ("its mean over text", 1.0),
    ("twice its value", 1.0),
)


class DeskConfig(Config):
    nodes: int = Field(16, ge=0)
    """Nodes recorded per circuit, those that matter most first; 0: no desk."""
    pairs: int = Field(4, ge=1)
    """Held-out pairs, of as many templates as there are."""


class Desk:
    """Both models on one batch of prompts, to be asked under one change after the other."""

    def __init__(
        self,
        dense: DenseModel,
        student: Student,
        bridges: BridgeSet,
        batch: TaskBatch,
        circuit: Circuit,
    ):
        self.dense, self.student, self.bridges, self.batch = dense, student, bridges, batch
        inside = torch.arange(batch.ids.shape[1], device=batch.ids.device) <= batch.last[:, None]
        self.inputs = {"input_ids": batch.ids, "attention_mask": inside.long(), "use_cache": False}
        recorder = Recorder(*{node.address for node in circuit.nodes})
        self.unedited = {
            "student": self._answers(student(batch.ids, tap=recorder).logits),
            "dense": self._answers(dense.model(**self.inputs).logits),
        }
        self.counterfactual = {
            address: batch.counterfactual(presented) for address, presented in recorder.activations.items()
        }

    def _answers(self, logits: Float[Tensor, "example seq vocab"]) -> tuple[Tensor, Tensor]:
        """Answer minus distractor, and the most likely next token, per prompt."""
        at_last = logits[torch.arange(len(logits), device=logits.device), self.batch.last]
        return self.batch.logit_difference(logits), at_last.argmax(-1)

    @torch.no_grad()
    def in_student(self, intervention: Intervention) -> tuple[Tensor, Tensor]:
        tap = intervention.tap(last=self.batch.last, counterfactual=self.counterfactual)
        return self._answers(self.student(self.batch.ids, tap=tap).logits)

    @torch.no_grad()
    def in_dense(self, intervention: Intervention) -> tuple[Tensor, Tensor]:
        """Raises InputError where the node cannot be carried over, with the reason."""
        live = LiveEdit(
            Edit.from_intervention(intervention, self.student, self.bridges), self.dense, self.student
        )
        with live.applied(last=self.batch.last, counterfactual=self.counterfactual) as model:
            return self._answers(model(**self.inputs).logits)


@torch.no_grad()
def record_desk(
    dense: DenseModel,
    student: Student,
    bridges: BridgeSet,
    circuit: Circuit,
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    means: Means,
    config: DeskConfig,
) -> dict[str, Any]:
    """Every setting of the circuit's most important nodes on the first pairs; see the module's text."""
    pairs = pairs[: config.pairs]
    if not circuit.nodes:
        return undefined("the circuit has no nodes")
    desk = Desk(dense, student, bridges, encode_pairs(pairs, tokenizer).to(dense.device), circuit)
    nodes, left_out, answers = rank(desk, circuit), [], []
    shown: list[Node] = []
    for node in nodes:
        if len(shown) == config.nodes:
            break
        changes = [change_of(node, target, strength, means) for target, strength in SETTINGS]
        try:
            carried = [desk.in_dense(change) for change in changes]
        except InputError as error:
            left_out.append({"node": str(node), "why": str(error)})
            continue
        shown.append(node)
        answers.append({"student": [desk.in_student(change) for change in changes], "dense": carried})
    table: dict[int, int] = {}
    return {
        "prompts": [*(prompt(p.clean, p.answer, p.distractor) for p in pairs)]
        + [*(prompt(p.corrupted, p.distractor, p.answer) for p in pairs)],
        "settings": [{"target": target, "strength": strength} for target, strength in SETTINGS],
        "nodes_total": len(circuit.nodes),
        "nodes": [str(node) for node in shown],
        "left_out": left_out,
        "unedited": {
            key: value
            for model, both in desk.unedited.items()
            for key, value in columns(model, both, table).items()
        },
        **{
            key: [[columns(model, both, table)[key] for both in node[model]] for node in answers]
            for model in ("student", "dense")
            for key in (model, f"{model}_top")
        },
        "tokens": [tokenizer.decode([token]) for token in table],
    }


def rank(desk: Desk, circuit: Circuit) -> list[Node]:
    """The circuit's nodes by how far a patch moves the student's answers on these prompts."""
    before = desk.unedited["student"][0]

    def moved(node: Node) -> float:
        return (desk.in_student(patch([node]))[0] - before).abs().mean().item()

    return sorted(circuit.nodes, key=lambda node: (-moved(node), node.sort_key))


def change_of(node: Node, target: str, strength: float, means: Means) -> Intervention:
    """One setting of the desk as an intervention."""
    if target == "the counterfactual's value":
        return patch([node], strength=strength)
    if target == "its mean over text":
        return ablate([node], means, strength=strength)
    return ablate([node], strength=-strength)  # away from zero by its own value: twice


def prompt(text: str, answer: str, distractor: str) -> dict[str, str]:
    return {"text": text, "answer": answer, "distractor": distractor}


def columns(model: str, answers: tuple[Tensor, Tensor], table: dict[int, int]) -> Mapping[str, list]:
    """Differences to four digits, and next tokens by their place in the table, which grows with them."""
    differences, top = answers
    return {
        model: [float(f"{difference:.4g}") for difference in differences.tolist()],
        f"{model}_top": [table.setdefault(token, len(table)) for token in top.tolist()],
    }
