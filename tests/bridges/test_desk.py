"""The recorded desk: on an exact copy with exact bridges, what is written shows the same in both models."""

import pytest
import torch

from bridges.dense import DenseModel
from bridges.desk import SETTINGS, DeskConfig, record_desk
from bridges.desk_table import desk_rows
from bridges.evaluate import measure_energies_
from bridges.warm_start import StudentShape, make_student
from extractor.circuit import Circuit, edges_between
from extractor.masks import mean_activations
from extractor.rotation import RotationConfig
from extractor.sites import Node
from extractor.tasks import make_pairs
from tests.conftest import tiny_gpt2

WRITES = ("0.attn.resid_delta", "0.mlp.post_act", "0.attn.v")
PAIRS = 3


@pytest.fixture(scope="module")
def parts(shipped_tokenizer):
    """Dense model, an exact copy, exact bridges, a circuit, its prompts and means."""
    dense = DenseModel(tiny_gpt2(vocab_size=len(shipped_tokenizer), n_positions=256))
    student, bridges = make_student(dense, StudentShape(hidden_size=40), RotationConfig(enabled=False))
    blocks = torch.randint(1, 2048, (4, 32), generator=torch.Generator().manual_seed(0))
    measure_energies_(dense, student, bridges, blocks)
    nodes = frozenset(Node(address, channel) for address in WRITES for channel in (1, 3))
    last = f"{student.config.num_hidden_layers - 1}.mlp.resid_delta"
    nodes |= {Node(last, 2)}  # written after the last site
    circuit = Circuit("with_as", nodes, edges_between(student, nodes), "none", {"prompts": "with_as"})
    pairs = make_pairs("with_as", shipped_tokenizer, split="held_out", count=8, seed=0, max_tokens=256)
    return dense, student, bridges, circuit, pairs, shipped_tokenizer, mean_activations(student, blocks)


@pytest.fixture(scope="module")
def desk(parts):
    return record_desk(*parts, DeskConfig(nodes=7, pairs=PAIRS))


def test_both_models_answer_the_same_when_one_copies_the_other(desk) -> None:
    """A crossing of what a node writes moves the dense stream as the student's own moves."""
    unedited = desk["unedited"]
    assert unedited["dense"] == pytest.approx(unedited["student"], abs=2e-3)
    assert unedited["dense_top"] == unedited["student_top"]
    moved = 0.0
    for student, dense in zip(desk["student"], desk["dense"], strict=True):
        for one, other in zip(student, dense, strict=True):
            assert other == pytest.approx(one, abs=2e-3)
            before = torch.tensor(desk["unedited"]["student"])
            moved = max(moved, (torch.tensor(one) - before).abs().max().item())
    assert moved > 1e-2  # the identity is not that nothing happens


def test_nothing_is_left_out_unsaid(desk, parts) -> None:
    circuit = parts[3]
    assert len(desk["nodes"]) == 6
    assert desk["nodes_total"] == len(circuit.nodes) == 7
    (left_out,) = desk["left_out"]
    assert left_out["node"] not in desk["nodes"]
    assert "after the last site" in left_out["why"]
    assert len(desk["prompts"]) == 2 * PAIRS
    assert all(len(node) == len(SETTINGS) for node in desk["student"])
    tops = {place for node in desk["dense_top"] for setting in node for place in setting}
    assert max(tops) < len(desk["tokens"])


def test_the_nodes_that_move_the_student_most_come_first(desk) -> None:
    at_one = [setting["strength"] for setting in desk["settings"]].index(1.0)
    before = torch.tensor(desk["unedited"]["student"])
    moved = [(torch.tensor(node[at_one]) - before).abs().mean().item() for node in desk["student"]]
    assert moved == sorted(moved, reverse=True)


def test_the_table_says_what_was_recorded(desk) -> None:
    rows = desk_rows(desk)
    assert len(rows) == 6 * len(SETTINGS)
    change = sum(b - a for a, b in zip(desk["unedited"]["dense"], desk["dense"][0][1], strict=True))
    assert float(rows[1][3]) == pytest.approx(change / (2 * PAIRS), rel=1e-2, abs=1e-4)


def test_an_empty_circuit_has_no_desk(parts) -> None:
    dense, student, bridges, circuit, *rest = parts
    empty = Circuit("with_as", frozenset(), (), "none", dict(circuit.settings))
    found = record_desk(dense, student, bridges, empty, *rest, DeskConfig())
    assert found == {"undefined": "the circuit has no nodes"}
