"""Passes that switch between the models: exact where the models are, and equal to the single switches."""

import pytest
import torch

from bridges import coupled as coupled_module
from bridges.coupled import CoupledModel, LossConfig
from bridges.dense import DenseModel
from bridges.evaluate import evaluate_mixtures, measure_energies_
from bridges.mixture import Mixture, random_path, run_path
from bridges.warm_start import StudentShape, make_student
from extractor.rotation import RotationConfig
from extractor.sites import Recorder, Site
from tests.families import tiny_model
from tests.families import tokens as family_tokens

TURNED = RotationConfig(stream_steps=20, head_steps=10)


@pytest.mark.parametrize("row", ["GPT-2", "GPT-NeoX, Pythia (parallel)", "Gemma 3 (text)", "OPT"])
def test_every_mixture_of_exact_copies_is_the_dense_model(row: str) -> None:
    dense = DenseModel(tiny_model(row))
    student, bridges = make_student(dense, StudentShape(), TURNED)
    found = evaluate_mixtures(dense, student, bridges, family_tokens(), count=12)
    assert len(found["paths"]) > 4
    assert max(map(abs, found["paths"].values())) < 1e-5
    assert found["kl_max"] == max(found["paths"].values())


def test_a_single_switch_is_the_pass_that_training_uses(dense: DenseModel, tokens: torch.Tensor) -> None:
    student, bridges = make_student(dense, StudentShape(start="random"), TURNED)
    run = dense.run(tokens)
    for site in dense.sites:
        encoded = bridges[site].encode(bridges.centred(run.resid[site]))
        expected = student(tokens, start=site, resid=encoded).logits
        first = run.resid[site]
        path = Mixture(True, (site,))
        assert torch.equal(run_path(path, dense, student, bridges, tokens, first=first), expected)


def test_a_path_crosses_every_bridge_it_names(dense: DenseModel, tokens: torch.Tensor) -> None:
    student, bridges = make_student(dense, StudentShape(start="random"), TURNED)
    crossed = (Site(0, "resid_mid"), Site(1, "resid_pre"), Site(1, "resid_mid"))
    recorder = Recorder(str(crossed[0]))
    student(tokens, tap=recorder)
    path, first = Mixture(False, crossed), recorder[str(crossed[0])]
    run_path(path, dense, student, bridges, tokens, first=first).sum().backward()
    for site in dense.sites:
        directions = (bridges[site].decoder, bridges[site].encoder)
        used = [linear.weight.grad is not None for linear in directions]
        decodes = site in crossed and crossed.index(site) % 2 == 0  # from the student first
        assert used == [site in crossed and decodes, site in crossed and not decodes], site
    assert student.layers[0].attn.q_proj.weight.grad.any()
    assert all(parameter.grad is None for parameter in dense.model.parameters())


def test_paths_are_functions_of_their_seed_and_switch_at_least_once(dense: DenseModel) -> None:
    paths = [random_path(dense.sites, 0.3, True, [0, i]) for i in range(50)]
    assert paths == [random_path(dense.sites, 0.3, True, [0, i]) for i in range(50)]
    assert all(path.switches for path in paths)
    assert len(set(map(str, paths))) > 5


@pytest.mark.parametrize("hybrid", ["sampled", "all", "multi"])
def test_training_on_every_kind_of_hybrid_pass(hybrid: str, dense: DenseModel, tokens: torch.Tensor) -> None:
    student, bridges = make_student(dense, StudentShape(), TURNED)
    measure_energies_(dense, student, bridges, tokens)
    with torch.no_grad():
        for parameter in bridges.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    config = LossConfig(hybrid_sites=hybrid, switch_probability=0.9, ce=0, kl=0, nmse=0)
    coupled = CoupledModel(student, bridges, dense, config)
    losses = coupled(tokens, seed=0, step=3)
    assert losses.kl_dense_to_sparse > 1e-4
    assert losses.kl_sparse_to_dense > 1e-4
    losses.total.backward()
    assert student.layers[1].mlp.up_proj.weight.grad.any()
    again = coupled(tokens, seed=0, step=3)
    assert torch.equal(again.total, losses.total)


def test_passes_run_again_give_the_same_gradients(
    dense: DenseModel, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    for held in (False, True):
        if held:
            monkeypatch.setattr(coupled_module, "checkpoint", lambda run, *args, **_: run(*args))
        torch.manual_seed(0)
        student, bridges = make_student(dense, StudentShape(start="random"), TURNED)
        measure_energies_(dense, student, bridges, tokens)
        CoupledModel(student, bridges, dense, LossConfig(hybrid_sites="all"))(
            tokens, seed=0, step=0
        ).total.backward()
        gradients.append([p.grad for p in [*student.parameters(), *bridges.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_losses_train_whom_the_config_says(dense: DenseModel, tokens: torch.Tensor) -> None:
    student, bridges = make_student(dense, StudentShape(start="random"), TURNED)
    measure_energies_(dense, student, bridges, tokens)
    off = {"ce": 0, "kl": 0, "hybrid": 0, "nmse_trains_student": False}
    CoupledModel(student, bridges, dense, LossConfig(**off))(tokens, seed=0, step=0).total.backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())
    assert bridges[dense.sites[0]].encoder.weight.grad.any()
