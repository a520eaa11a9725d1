"""Selection by more than size: the factors are what they say, and the count stays exact."""

import pytest
import torch
from torch import nn

from extractor.scores import WeightScores
from extractor.sites import Recorder
from extractor.sparsity import SparsityConfig, WeightSparsifier
from extractor.student import Student
from extractor.training import OptimizerConfig, make_optimizer
from tests.conftest import tiny_student_config


def sparsifier_of(weight: nn.Parameter, density: float, floor: int = 0) -> WeightSparsifier:
    config = SparsityConfig(density=density, anneal_frac=0, min_weights_per_neuron=floor)
    return WeightSparsifier({"up_proj.weight": weight}, config, 1)


@pytest.mark.parametrize("floor", [0, 2])
def test_factors_that_are_alike_select_as_size_alone(floor: int) -> None:
    torch.manual_seed(0)
    first = nn.Parameter(torch.randn(16, 32))
    second = nn.Parameter(first.detach().clone())
    sparsifier_of(first, 0.125, floor).project_(1)
    sparsifier_of(second, 0.125, floor).project_(1, {"up_proj.weight": torch.full((32,), 3.0)})
    assert torch.equal(first, second)
    assert first.count_nonzero() == 64


def test_a_small_weight_of_a_loud_input_outlasts_a_large_one_of_a_quiet_input() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, 5.0], [2.0, 4.0]]))
    sparsifier_of(weight, 0.5).project_(1, {"up_proj.weight": torch.tensor([10.0, 1.0])})
    assert weight.tolist() == [[1.0, 0.0], [2.0, 0.0]]


def test_where_a_factor_is_zero_weights_still_come_before_zeros_and_by_size() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 5.0, 0.0], [2.0, 4.0, 0.0]]))
    sparsifier_of(weight, 0.5).project_(1, {"up_proj.weight": torch.tensor([0.0, 0.0, 9.0])})
    assert weight.tolist() == [[3.0, 5.0, 0.0], [0.0, 4.0, 0.0]]
    sparsifier_of(weight, 0.34).project_(1, {"up_proj.weight": torch.zeros(2, 3)})
    assert weight.tolist() == [[0.0, 5.0, 0.0], [0.0, 4.0, 0.0]]


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    return Student(tiny_student_config())


def test_input_factors_are_the_rms_of_what_each_matrix_reads_since_the_last_step(student: Student) -> None:
    scores = WeightScores(student, "input", make_optimizer(student, OptimizerConfig()))
    old, ids = torch.randint(0, student.config.vocab_size, (2, 3, 8))
    student(old)
    scores.factors()  # that step's
    reads, neurons = "1.mlp.act_in", "1.mlp.post_act"
    recorder = Recorder(reads, neurons)
    student(ids, tap=recorder)
    factors = scores.factors()
    again = scores.factors()  # until the next pass
    matrices = {f"{name}.weight" for name, module in student.named_modules() if isinstance(module, nn.Linear)}
    assert set(factors) == matrices
    for name, address in (("up_proj", reads), ("down_proj", neurons)):
        own = f"layers.1.mlp.{name}.weight"
        squares = recorder[address].detach().float().square().flatten(0, -2)
        torch.testing.assert_close(factors[own], squares.sum(0).sqrt())
        assert torch.equal(factors[own], again[own])
    with scores:
        student(old)
    after = scores.factors()
    student(ids)  # training is over
    assert all(torch.equal(after[name], value) for name, value in scores.factors().items())


def test_curvature_factors_are_the_optimisers(student: Student) -> None:
    optimizer = make_optimizer(student, OptimizerConfig())
    scores = WeightScores(student, "curvature", optimizer)
    assert scores.factors() == {}  # before the first step
    student(torch.randint(0, student.config.vocab_size, (2, 8))).logits.square().mean().backward()
    gradient = student.layers[0].mlp.up_proj.weight.grad.clone()
    optimizer.step()
    found = scores.factors()["layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(found, gradient.abs() * (1 - 0.95) ** 0.5)


def test_size_alone_needs_no_factors(student: Student) -> None:
    scores = WeightScores(student, "magnitude", make_optimizer(student, OptimizerConfig()))
    student(torch.randint(0, student.config.vocab_size, (2, 8)))
    assert scores.factors() == {}
