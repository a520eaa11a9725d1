"""A small run folder, as train, extract and edit leave it: for the live desk and the pages around it."""

import json
from pathlib import Path

import torch
import yaml

from bridges.checkpoint import DenseConfig
from bridges.dense import DenseModel
from bridges.edit import Edit, EditLimits
from bridges.evaluate import evaluate_bridges, measure_energies_
from bridges.warm_start import StudentShape, make_student
from extractor.artifacts import fingerprint, write_json
from extractor.circuit import Circuit, edges_between
from extractor.data import DataConfig
from extractor.intervention import patch
from extractor.masks import mean_activations, save_means
from extractor.rotation import RotationConfig
from extractor.sites import Node
from extractor.tasks import Pair, make_pairs
from tests.conftest import ROOT

TASKS = ("with_as", "bracket_paren", "longer")
ADDRESSES = ("0.attn.act_in", "0.mlp.act_in", "0.mlp.post_act", "0.attn.v", "1.attn.act_in")
OF_EDIT = "1.mlp.act_in:5"  # an edit may move channels that its circuit does not have
READS = ["0.mlp.act_in:3", "0.mlp.act_in:9"]
LAST_WRITE = Node("1.mlp.resid_delta", 2)  # written after the last site: the dense model has no place for it
LONGER = Pair("with open(path, mode) as a:\n    b =", "with open(path) as a:\n    b =", " one", " two", 0)


def make_live_run(run: Path, tiny_checkpoint: Path, shipped_tokenizer) -> Path:
    """What train, extract and edit leave, of a student that copies an untrained model."""
    dense = DenseModel.from_pretrained(DenseConfig(path=str(tiny_checkpoint)))
    student, bridges = make_student(dense, StudentShape(hidden_size=40), RotationConfig(enabled=False))
    blocks = torch.randint(1, 2048, (4, 32), generator=torch.Generator().manual_seed(0))
    measure_energies_(dense, student, bridges, blocks)
    student.save_pretrained(run / "student")
    shipped_tokenizer.save_pretrained(run / "student")
    sha = fingerprint(run / "student")
    bridges.save_pretrained(run / "bridges", dense_sha256=dense.sha256)
    means = mean_activations(student, blocks)
    facts = {"student_sha256": sha, "train_text_sha256": "text"}
    save_means(run / "circuits" / "means.safetensors", means, facts)
    nodes = frozenset(Node(address, channel) for address in ADDRESSES for channel in (3, 9)) | {LAST_WRITE}
    for task in TASKS:
        prompts = "with_as" if task == "longer" else task
        (pair,) = make_pairs(prompts, shipped_tokenizer, split="held_out", count=1, seed=0, max_tokens=128)
        pair = LONGER if task == "longer" else pair
        example = {name: getattr(pair, name) for name in ("clean", "corrupted", "answer", "distractor")}
        evidence = {"example": example, "verdict": {"word": "supported", "reasons": []}}
        settings = {"prompts": prompts, "ablation": "mean"}
        circuit = Circuit(task, nodes, edges_between(student, nodes), sha, settings, evidence=evidence)
        circuit.save(run / "circuits" / f"{task}.json")
    figures = evaluate_bridges(dense, student, bridges, blocks)
    write_json(run / "evaluation.json", {"schema_version": 1, "bridges": figures})
    text = DataConfig(source=str(ROOT / "extractor"), held_out_frac=0.3, context_length=32)
    config = {"dense": {"path": str(tiny_checkpoint)}, "data": text.model_dump(mode="json")}
    (run / "config.yaml").write_text(yaml.safe_dump(config) + "# processes 1\n")
    change = patch([Node.parse(OF_EDIT)]).of_student(sha)
    measured = {"strengths": [0.0, 1.0, 2.0], "flip_rate_indirect": [0.0, 0.1, 0.4]}
    growth = [{"nodes": [OF_EDIT, "1.mlp.act_in:7"]}, {"nodes": READS[::-1]}]
    Edit.from_intervention(change, student, bridges).save(
        run / "edits" / "with_as", {**measured, "growth": growth, "limits": EditLimits().model_dump()}
    )
    edit = json.loads((run / "edits" / "with_as" / "edit.json").read_text())
    write_json(run / "edits" / "with_as" / "edit.json", edit | {"student_sha256": sha})
    return run
