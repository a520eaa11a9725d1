"""Turning the free bases leaves the function of every student, and makes the matrices sparser."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from extractor import rotation
from extractor.rotation import RotationConfig, ScatteredRows, StackedRows, find_turns, minimise_l1, rotate_
from extractor.student import Student
from extractor.turns import Turns, apply_turns_, deviation
from tests.conftest import tiny_student_config

CONFIG = RotationConfig(stream_steps=60, head_steps=30)

ROPE = {"position_embedding_type": "rope", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
GROUPED = {"num_key_value_heads": 2, "gated_mlp": True, "hidden_act": "silu"}
STUDENTS = {
    "learned": {},
    "grouped_learned": GROUPED,
    "rope_grouped_gated": ROPE | GROUPED,
    "head_norms": ROPE | {"qk_norm": "head", "num_key_value_heads": 1},
    "post_norms_only": ROPE | GROUPED | {"pre_norm": False, "post_norm": True, "qk_norm": "full"},
    "sandwich_norms": GROUPED | {"post_norm": True, "position_embedding_type": "none"},
    "parallel_sink": {"parallel_residual": True, "attention_sink": True, "attn_logit_softcapping": 5.0},
}
HAVE_FREE_STREAM = {name: not options.get("post_norm", False) for name, options in STUDENTS.items()}
HAVE_FREE_QK = {"learned", "grouped_learned", "sandwich_norms", "parallel_sink"}


def random_orthogonal(*shape: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0].contiguous()


def untrained(**options: object) -> Student:
    """A student with every weight, gain and bias away from its default."""
    student = Student(tiny_student_config(**options)).eval()
    for parameter in student.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return student


def weights_of(student: Student) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in student.named_parameters()}


def relative_l1(student: Student) -> float:
    matrices = [matrix.detach() for matrix in student.sparse_matrices().values()]
    return sum(m.abs().mean().item() / m.square().mean().sqrt().item() for m in matrices)


@pytest.mark.parametrize("kind", STUDENTS)
def test_random_turns_leave_the_logits(kind: str, tokens: torch.Tensor) -> None:
    student = untrained(**STUDENTS[kind]).double()
    before = student(tokens).logits
    heads = (2, student.config.num_key_value_heads, 8, 8)
    turns = Turns(
        random_orthogonal(32, 32) if HAVE_FREE_STREAM[kind] else None,
        random_orthogonal(*heads) if kind in HAVE_FREE_QK else None,
        random_orthogonal(*heads),
    )
    apply_turns_(student, turns)
    torch.testing.assert_close(student(tokens).logits, before, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", STUDENTS)
def test_rotation_turns_what_is_free_and_keeps_the_function(kind: str, tokens: torch.Tensor) -> None:
    student = untrained(**STUDENTS[kind])
    before, weights, l1 = student(tokens).logits, weights_of(student), relative_l1(student)
    turn = rotate_(student, CONFIG)
    assert (student(tokens).logits - before).abs().max() <= 1e-4 * before.abs().max()
    assert relative_l1(student) < l1
    assert torch.equal(turn, torch.eye(32)) != HAVE_FREE_STREAM[kind]
    embed = student.embed_tokens.weight
    torch.testing.assert_close(embed, weights["embed_tokens.weight"] @ turn, atol=1e-5, rtol=1e-5)
    changed = {name for name, value in weights_of(student).items() if not torch.equal(value, weights[name])}
    assert {"layers.1.attn.v_proj.bias", "layers.1.attn.o_proj.weight"} <= changed
    assert ("layers.1.attn.k_proj.bias" in changed) == (kind in HAVE_FREE_QK)


def test_turns_are_orthogonal_and_the_search_leaves_the_student(student: Student) -> None:
    weights = weights_of(student)
    turns = find_turns(student, CONFIG)
    for turn in vars(turns).values():
        assert turn.dtype == torch.float64
        assert deviation(turn) < 1e-12
        assert deviation(turn.float()) < 1e-6
    assert all(torch.equal(weights[name], value) for name, value in weights_of(student).items())


def test_rotation_is_deterministic_from_its_seed(student: Student) -> None:
    weights = weights_of(student)
    config = CONFIG.model_copy(update={"sampled_rows": 100})
    rotate_(student, config)
    once = weights_of(student)
    student.load_state_dict(weights)
    rotate_(student, config)
    assert all(torch.equal(once[name], value) for name, value in weights_of(student).items())
    student.load_state_dict(weights)
    rotate_(student, config.model_copy(update={"seed": 1}))
    assert not torch.equal(once["lm_head.weight"], student.lm_head.weight)


@pytest.mark.parametrize("width", [12, 96])
def test_a_hidden_sparse_basis_is_found(width: int) -> None:
    sparse = torch.randn(3000, width) * (torch.rand(3000, width) < 0.15)
    hidden = random_orthogonal(width, width).float()
    rows = ScatteredRows(list((sparse @ hidden.T).split(700)))
    start = torch.eye(width, dtype=torch.float64)[None]
    found = minimise_l1(rows, start, 400, RotationConfig(), torch.Generator().manual_seed(0))[0]
    recovered = hidden.T @ found.float()  # a signed permutation
    torch.testing.assert_close(recovered.abs().max(0).values, torch.ones(width), atol=0.03, rtol=0)


def test_scattered_rows_are_drawn_from_every_matrix_at_unit_rms() -> None:
    matrices = [torch.full((50, 3), 7.0), torch.zeros(20, 3), torch.full((3, 30), -2.0).T]
    rows = ScatteredRows(matrices)
    assert rows.sample(1000, torch.Generator()).shape == (1, 100, 3)
    sample = rows.sample(60, torch.Generator().manual_seed(0))[0]
    assert sample.shape == (60, 3)
    assert set(sample[:, 0].tolist()) == {1.0, 0.0, -1.0}
    drawn = [(sample[:, 0] == value).float().mean().item() for value in (1, 0, -1)]
    assert drawn == pytest.approx([0.5, 0.2, 0.3], abs=0.2)


def test_each_group_gets_its_own_turn() -> None:
    rows = StackedRows(torch.randn(2, 40, 5))
    start = torch.eye(5, dtype=torch.float64).repeat(2, 1, 1)
    found = minimise_l1(rows, start, 20, RotationConfig(), torch.Generator())
    assert not torch.allclose(found[0], found[1], atol=0.01)


def test_an_all_zero_matrix_does_no_harm(student: Student, tokens: torch.Tensor) -> None:
    student.embed_positions.weight.data.zero_()
    student.layers[0].attn.q_proj.weight.data.zero_()
    before = student(tokens).logits
    rotate_(student, CONFIG)
    assert (student(tokens).logits - before).abs().max() <= 1e-4 * before.abs().max()


def test_rotation_off_is_the_identity(student: Student) -> None:
    before = weights_of(student)
    assert torch.equal(rotate_(student, RotationConfig(enabled=False), cache_key="start"), torch.eye(32))
    assert all(torch.equal(before[name], p) for name, p in student.named_parameters())


# --- the cache -------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSEBRIDGE_CACHE", str(tmp_path))
    return tmp_path / "rotations"


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Student]:
    """The students that turns were searched for."""
    calls = []

    def counted(student: Student, config: RotationConfig, show_progress: bool = False) -> Turns:
        calls.append(student)
        return find_turns(student, config, show_progress)

    monkeypatch.setattr(rotation, "find_turns", counted)
    return calls


def rotated(key: str | None = "start", config: RotationConfig = CONFIG, **options: object) -> dict:
    torch.manual_seed(0)
    student = untrained(**options)
    rotate_(student, config, cache_key=key)
    return weights_of(student)


def test_cached_turns_give_the_same_student_bit_for_bit(cache: Path, searches: list) -> None:
    fresh, found, read = rotated(None), rotated(), rotated()
    assert len(searches) == 2
    assert len(list(cache.iterdir())) == 1
    for name, value in fresh.items():
        assert torch.equal(value, found[name])
        assert torch.equal(value, read[name])


def test_the_cache_is_read_and_applied(cache: Path, searches: list) -> None:
    rotated()
    (path,) = cache.iterdir()
    sentinel = random_orthogonal(32, 32)
    save_file(load_file(path) | {"stream": sentinel}, path)
    torch.manual_seed(0)
    student = untrained()
    embed = student.embed_tokens.weight.detach().clone()
    assert torch.equal(rotate_(student, CONFIG, cache_key="start"), sentinel.float())
    torch.testing.assert_close(student.embed_tokens.weight, (embed.double() @ sentinel).float())
    assert len(searches) == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_turn(path: Path) -> None:
    save_file({"stream": load_file(path)["stream"]}, path)


def bend(path: Path) -> None:
    tensors = load_file(path)
    tensors["vo"][1, 2, 3, 3] += 1e-3
    save_file(tensors, path)


def blank(path: Path) -> None:
    save_file({name: torch.full_like(turn, torch.nan) for name, turn in load_file(path).items()}, path)


def shrink(path: Path) -> None:
    save_file(load_file(path) | {"stream": torch.eye(16, dtype=torch.float64)}, path)


@pytest.mark.parametrize("damage", [truncate, drop_a_turn, bend, blank, shrink])
def test_a_damaged_cache_is_ignored_and_rewritten(damage, cache: Path, searches: list) -> None:
    found = rotated()
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    damage(path)
    again = rotated()
    assert len(searches) == 2
    assert all(torch.equal(found[name], value) for name, value in again.items())
    assert path.read_bytes() == whole


def test_what_the_cache_distinguishes(cache: Path) -> None:
    few_steps = CONFIG.model_copy(update={"stream_steps": 3})
    wide = {"intermediate_size": 64}
    rotated()
    for changes in ({"key": "other"}, {"config": few_steps}, wide, STUDENTS["post_norms_only"]):
        rotated(**changes)
    assert len(list(cache.iterdir())) == 5


def test_no_cache_when_it_is_off(cache: Path, searches: list) -> None:
    rotated(config=CONFIG.model_copy(update={"cache": False}))
    assert not cache.exists()
    rotated()
    rotated(config=CONFIG.model_copy(update={"seed": 0, "cache": True}))
    assert len(searches) == 2


def test_a_cache_that_cannot_be_written_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSEBRIDGE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not cached"):
        found = rotated()
    assert all(torch.equal(found[name], value) for name, value in rotated(None).items())
