"""The student and bridges that ship are those of their evaluation, and belong to the dense model."""

import json

import torch

from bridges.checkpoint import DenseConfig
from bridges.run_models import RunModels
from extractor.artifacts import file_sha256
from extractor.tasks import accuracy, encode_pairs, make_pairs
from tests.conftest import ROOT

TRAINED = ROOT / "recipes" / "python" / "trained"


def test_the_shipped_student_and_bridges_are_whole_and_do_a_task_in_both_streams() -> None:
    manifest = json.loads((TRAINED / "manifest.json").read_text())["train"]["outputs"]
    for name in ("student/model.safetensors", "bridges/bridges.safetensors", "evaluation.json"):
        assert manifest[name] == file_sha256(TRAINED / name)
    dense = DenseConfig(path=str(ROOT / "recipes" / "python" / "dense"))
    models = RunModels(TRAINED, dense, torch.device("cpu"), needs_circuits=False)  # checks the hashes
    stated = json.loads((TRAINED / "evaluation.json").read_text())
    assert sum(int(p.count_nonzero()) for p in models.student.parameters()) == stated["student"]["nonzeros"]
    pairs = make_pairs("with_as", models.tokenizer, split="held_out", count=8, seed=0)
    batch = encode_pairs(pairs, models.tokenizer)
    site = models.bridges.sites[2]
    with torch.no_grad():
        run = models.dense.run(batch.ids, record=[site])
        own = models.student(batch.ids).logits
        encoded = models.bridges[site].encode(models.bridges.centred(run.resid[site]))
        crossed = models.student(batch.ids, start=site, resid=encoded).logits
    for logits in (run.logits, own, crossed):
        assert accuracy(batch.logit_difference(logits)) >= 0.9
