"""What nodes cost: the slopes they are from, and which of two nodes alike a search keeps."""

import pytest
import torch
import torch.nn.functional as F

from extractor.adversary import node_index
from extractor.mask_learning import PruneConfig, learn_masks
from extractor.masks import GateTap, NodeMasks, mean_activations
from extractor.prices import AT_MOST, node_prices
from extractor.prune import task_settings
from extractor.refine import RefineConfig, drop_spare_nodes
from extractor.sites import Node
from extractor.student import Student
from extractor.student_config import StudentConfig
from tests.extractor.test_circuits import planted_student, planted_task

ALIKE = Node.parse("0.mlp.post_act:0"), Node.parse("0.mlp.post_act:1")


def twin_student() -> Student:
    """The planted student with its neuron twice: one of the two is enough."""
    student = planted_student()
    mlp = student.layers[0].mlp
    with torch.no_grad():
        mlp.up_proj.weight[1] = mlp.up_proj.weight[0]
        mlp.up_proj.bias[1] = mlp.up_proj.bias[0]
        mlp.down_proj.weight[:, 1] = 0
        mlp.down_proj.weight[2, :2] = 0.3  # little, so that the last norm leaves them apart
    return student.requires_grad_(False)


@pytest.mark.parametrize(("dear", "cheap"), [ALIKE, ALIKE[::-1]])
def test_of_two_nodes_alike_the_dear_one_goes(dear: Node, cheap: Node) -> None:
    student = twin_student()
    means = mean_activations(student, planted_task(64, 0).ids)
    masks = NodeMasks(means, [0], prices=torch.where(node_index([dear], means), 5.0, 1.0))
    everything = torch.ones_like(masks.tau[0], dtype=torch.bool)
    kept = masks.nodes(drop_spare_nodes(student, masks, everything, 0.3, planted_task(32, 1), RefineConfig()))
    assert cheap in kept
    assert dear not in kept


def test_a_mask_pays_for_its_nodes() -> None:
    """A node that the task could do with, but that costs more than that, is closed."""
    train, selection = planted_task(64, 0), planted_task(32, 1)
    student = twin_student()
    means = mean_activations(student, train.ids)
    config = PruneConfig(steps=80, pairs_per_step=16)
    settings = task_settings(student, train, selection, config)
    free = learn_masks(student, settings, means, config)
    assert (free.tau > 0).any()
    prices = torch.full_like(free.prices, 1000)
    assert not (learn_masks(student, settings, means, config, prices=prices).tau > 0).any()


def test_where_text_needs_no_node_all_cost_one() -> None:
    student = planted_student().requires_grad_(False)
    with torch.no_grad():
        student.lm_head.weight.zero_()
    ids = planted_task(8, 0).ids
    assert (node_prices(student, ids, mean_activations(student, ids), 2.0) == 1).all()


def test_prices_are_slopes_of_the_loss_on_text() -> None:
    torch.manual_seed(0)
    student = Student(StudentConfig(vocab_size=13, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                                    num_attention_heads=2, head_dim=4))  # fmt: skip
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(std=0.5)
        student.layers[0].mlp.down_proj.weight[:, 3] = 0  # a neuron that nothing reads
    student.requires_grad_(False).double()
    blocks = torch.randint(13, (5, 12))
    means = {address: mean.double() for address, mean in mean_activations(student, blocks).items()}
    assert node_prices(student, blocks, means, 0.0) is None
    prices = node_prices(student, blocks, means, 2.0)
    assert prices.min() == 1
    assert prices.max() <= 1 + 2 * AT_MOST
    assert prices[node_index([Node.parse("0.mlp.post_act:3")], means)] == 1

    masks = NodeMasks(means, [0])
    step = 1e-5

    def losses(gates: torch.Tensor) -> torch.Tensor:
        logits = student(blocks, tap=GateTap(masks)(gates.double())).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten(), reduction="none")
        return loss.view(len(blocks), -1).mean(1)

    def importance(node: str) -> float:
        closed = step * node_index([Node.parse(node)], means).double()
        gates = torch.ones(len(blocks), len(closed))
        return ((losses(gates + closed) - losses(gates - closed)) / (2 * step)).abs().mean().item()

    several = ["0.attn.act_in:1", "0.attn.q:2", "0.attn.v:5", "0.mlp.post_act:7"]
    index = [int(node_index([Node.parse(node)], means).nonzero()) for node in several]
    measured = torch.tensor([importance(node) for node in several])
    given = (prices[index] - 1).float()
    assert given.max() < 2 * AT_MOST  # none is cut off
    torch.testing.assert_close(given / given[0], measured / measured[0], rtol=1e-3, atol=1e-5)
