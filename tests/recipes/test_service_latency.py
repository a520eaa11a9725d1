"""How long an intervention takes, as a ratio to the two plain forwards that it stands for."""

import shutil
import sys

import pytest
import torch

from bridges.service.desk_request import DeskRequest
from bridges.service.live_desk import LiveDesk
from extractor.artifacts import fingerprint
from extractor.circuit import Circuit, edges_between
from extractor.clock import interleave, ratio
from extractor.masks import mean_activations, save_means
from extractor.sites import Node
from extractor.student import load_student
from extractor.tasks import make_pairs
from tests.conftest import ROOT

KINDS = ("attn.act_in", "attn.q", "attn.k", "attn.v", "attn.resid_delta", "mlp.act_in", "mlp.post_act",
         "mlp.resid_delta")  # fmt: skip
LAYERS = (0, 2)
ROUNDS = 15


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> LiveDesk:
    """The shipped models, with a circuit of two nodes at every address."""
    run = tmp_path_factory.mktemp("runs") / "shipped"
    shutil.copytree(ROOT / "recipes" / "python" / "trained", run)
    student, tokenizer = load_student(run / "student", torch.device("cpu"))
    sha = fingerprint(run / "student")
    blocks = torch.randint(1, 2048, (4, 64), generator=torch.Generator().manual_seed(0))
    facts = {"student_sha256": sha, "train_text_sha256": "text"}
    save_means(run / "circuits" / "means.safetensors", mean_activations(student, blocks), facts)
    nodes = frozenset(
        Node(f"{layer}.{kind}", channel) for layer in LAYERS for kind in KINDS for channel in (3, 9)
    )
    (pair,) = make_pairs("with_as", tokenizer, split="held_out", count=1, seed=0, max_tokens=128)
    example = {name: getattr(pair, name) for name in ("clean", "corrupted", "answer", "distractor")}
    settings = {"prompts": "with_as", "ablation": "mean"}
    circuit = Circuit(
        "with_as", nodes, edges_between(student, nodes), sha, settings, evidence={"example": example}
    )
    circuit.save(run / "circuits" / "with_as.json")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(ROOT)  # the run's config names the checkpoint from here
        return LiveDesk.of_run(run)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_an_intervention_takes_little_more_than_two_forwards(desk: LiveDesk, layer: int, kind: str) -> None:
    example = desk.models.circuits["with_as"].evidence["example"]
    request = DeskRequest(
        task="with_as", nodes=(f"{layer}.{kind}:3", f"{layer}.{kind}:9"), strength=2.0,
        prompt=example["clean"], counterfactual=example["corrupted"],
    )  # fmt: skip
    ids = desk.models.tokenizer(request.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert "undefined" not in desk.intervene(request)["dense"]

    @torch.inference_mode()
    def forwards() -> None:
        desk.models.student(ids)
        desk.models.dense.model(ids, use_cache=False)

    works = {"intervention": lambda: desk.intervene(request), "forwards": forwards}
    times = interleave(works, ROUNDS, torch.device("cpu"))
    own = ratio(times, "intervention", "forwards")
    sys.stdout.write(f"{layer}.{kind}: {own.median:.2f} ({own.low:.2f} to {own.high:.2f})\n")
    assert own.median <= 2.5  # the aim is 1.5; with two more student runs q, k and v take 3.3
