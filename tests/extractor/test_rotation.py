"""Turning the free bases leaves the function, and makes the matrices sparser."""

import torch

from extractor.rotation import RotationConfig, minimise_l1, rotate_, turn_qk_, turn_stream_, turn_vo_
from extractor.student import Student

CONFIG = RotationConfig(stream_steps=60, head_steps=30)


def random_orthogonal(*shape: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]


def test_random_turns_leave_the_logits(student: Student, tokens: torch.Tensor) -> None:
    student.double()
    for parameter in student.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    before = student(tokens).logits
    turn_stream_(student, random_orthogonal(32, 32))
    turn_qk_(student, random_orthogonal(8, 8, 8))
    turn_vo_(student, random_orthogonal(8, 8, 8))
    torch.testing.assert_close(student(tokens).logits, before, atol=1e-10, rtol=1e-10)


def test_rotation_is_orthogonal_deterministic_and_exact(student: Student, tokens: torch.Tensor) -> None:
    before = student(tokens).logits
    weights = {name: parameter.clone() for name, parameter in student.named_parameters()}
    turn = rotate_(student, CONFIG)
    torch.testing.assert_close(turn @ turn.T, torch.eye(32), atol=1e-6, rtol=0)
    torch.testing.assert_close(student(tokens).logits, before, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(
        student.embed_tokens.weight, weights["embed_tokens.weight"] @ turn, atol=1e-5, rtol=1e-5
    )
    student.load_state_dict(weights)
    assert torch.equal(rotate_(student, CONFIG), turn)


def test_a_hidden_sparse_basis_is_found() -> None:
    sparse = torch.randn(2000, 12) * (torch.rand(2000, 12) < 0.15)
    hidden = random_orthogonal(12, 12).float()
    config = RotationConfig(learning_rate=0.05)
    generator = torch.Generator().manual_seed(0)
    found = minimise_l1((sparse @ hidden.T)[None], 600, config, generator, "", False)[0].float()
    recovered = hidden.T @ found  # a signed permutation
    torch.testing.assert_close(recovered.abs().max(0).values, torch.ones(12), atol=0.02, rtol=0)


def test_rotation_off_is_the_identity(student: Student) -> None:
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    assert torch.equal(rotate_(student, RotationConfig(enabled=False)), torch.eye(32))
    assert all(torch.equal(before[name], p) for name, p in student.named_parameters())
