"""An edit beside its alternatives: selections and curves as identities, directions on planted tasks."""

import json
import math

import pytest
import torch

from bridges.alternatives import (
    FORMS,
    AlternativesConfig,
    all_steerings,
    alternatives_table,
    compare_alternatives,
    draw_alternatives,
    random_nodes,
    steered_curve,
)
from bridges.dense import DenseModel
from bridges.edit import Edit
from bridges.evaluate import measure_energies_
from bridges.flip_curves import EditedPrompts, measure_curve, select_prompts
from bridges.hooks import hooked
from bridges.off_target import HeldOutText
from bridges.plain_directions import (
    best_channel,
    difference_of_means,
    probe_direction,
    unembedding_difference,
)
from bridges.plots import draw
from bridges.steering import DIRECTIONS, acts_at, half, told_apart
from bridges.steering_gate import GateConfig, fit_steering
from bridges.streams import PromptStreams
from bridges.tails import PromptTails
from bridges.task_lora import TaskLoraConfig
from bridges.warm_start import StudentShape, make_student
from extractor.rotation import RotationConfig
from extractor.sites import Node, Site
from extractor.tasks import TaskBatch
from tests.families import tiny_model

CONFIG = AlternativesConfig(limits=(0.01, 0.1, 1.0), lora=TaskLoraConfig(steps=5, prompts_per_step=4))
NO_ROTATION = RotationConfig(enabled=False)


def pairs(dense: DenseModel, seed: int = 3) -> TaskBatch:
    """Eight pairs of several lengths that differ in one token; each answer is the model's own."""
    ids = torch.randint(1, 97, (8, 9), generator=torch.Generator().manual_seed(seed)).repeat(2, 1)
    ids[:8, 4], ids[8:, 4] = 11, 12
    last = torch.tensor([8, 7, 6, 5] * 4)
    with torch.no_grad():
        top = dense.run(ids, record=False).logits[torch.arange(16), last].topk(2).indices
    order = torch.where(torch.arange(16) % 8 == 7, 1, 0)  # one pair is answered wrong
    chosen = top[torch.arange(16), order], top[torch.arange(16), 1 - order]
    return TaskBatch(ids, last, *chosen, cluster=(torch.arange(16) % 8) // 2)


def text(dense: DenseModel) -> HeldOutText:
    blocks = torch.randint(1, 97, (6, 12), generator=torch.Generator().manual_seed(6))
    return HeldOutText(dense, blocks, batch_size=4)


def setup(dense: DenseModel, tokens: torch.Tensor, site: Site, channels: range):
    student, bridges = make_student(dense, StudentShape(), NO_ROTATION)
    measure_energies_(dense, student, bridges, tokens)
    train, held_out = (PromptStreams(dense, student, bridges, pairs(dense, seed)) for seed in (3, 4))
    edit = Edit.from_nodes([Node(site.read_address, channel) for channel in channels], site, bridges)
    return edit, train, held_out, text(dense), student, bridges


# --- prompts and curves ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("places", ["late", "early", "some of each, on half of the prompts"])
def test_flips_are_those_of_all_prompts_run_together(dense, places: str) -> None:
    tails, site = PromptTails(dense, pairs(dense)), Site(0, "resid_mid")
    vectors = 3 * torch.randn(*tails.batch.ids.shape, dense.width, generator=torch.Generator().manual_seed(5))
    is_late = torch.arange(9) >= tails.start[:, None]
    if places == "late":
        vectors = vectors * is_late[..., None]
    elif places != "early":
        vectors = vectors * (is_late | (torch.arange(16) % 4 == 0)[:, None])[..., None]
        vectors = vectors * (torch.arange(16) % 2 == 0)[:, None, None]
    prompts = zip(tails.batch.ids, tails.batch.last, vectors, strict=True)
    by_prompt = {tuple(ids[: n + 1].tolist()): vector for ids, n, vector in prompts}
    expected = [difference < 0 for difference in tails.differences(site, 1.5 * vectors)]
    for direction in DIRECTIONS:
        own = EditedPrompts(tails, site, direction)
        mine = half(tails.batch, direction) & (tails.unedited > 0)
        assert len(own) == int(mine.sum()) == 7

        def delta_of(part: PromptTails) -> torch.Tensor:
            width = part.batch.ids.shape[1]
            prompts = zip(part.batch.ids, part.batch.last, strict=True)
            return torch.stack([by_prompt[tuple(ids[: n + 1].tolist())][:width] for ids, n in prompts])

        found = own.flipped(own.deltas(delta_of), 1.5)
        order = mine.nonzero()[:, 0]
        order = order[torch.argsort(tails.batch.last[order], stable=True)]
        for flips, all_flips in zip(found, expected, strict=True):
            assert torch.equal(flips, all_flips[order])
        assert torch.equal(own.cluster, tails.batch.cluster[order])
        assert not any(flips.any() for flips in own.flipped(own.deltas(delta_of), 0.0))
    assert expected[0][tails.unedited > 0].any()


@torch.no_grad()
def test_selected_prompts_answer_as_they_did_among_the_others(dense) -> None:
    tails, site = PromptTails(dense, pairs(dense)), Site(1, "resid_pre")
    delta = torch.randn(16, 9, dense.width, generator=torch.Generator().manual_seed(5))
    for late in (False, True):
        if late:
            delta = delta * (torch.arange(9) >= tails.start[:, None])[..., None]
        for rows in (torch.tensor([3, 9, 14]), tails.batch.last < 7):
            part = select_prompts(tails, rows)
            assert part.prefix is not None
            moved = part.differences(site, delta[rows, : part.batch.ids.shape[1]])
            for own, all_of_them in zip(moved, tails.differences(site, delta), strict=True):
                torch.testing.assert_close(own, all_of_them[rows], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "kl_at",
    [lambda s: 0.03 * s**2, lambda s: 40 * s**1.5, lambda s: 0.05 * s**2 / (1 + s**2), lambda s: 0.0,
     lambda s: 0.0 if s < 0.5 else 0.02 * s],
    ids=["square", "steep", "saturating", "no gate opens", "opens late"],
)  # fmt: skip
def test_strengths_reach_the_limits_and_never_pass_them(kl_at) -> None:
    limits = (0.001, 0.005, 0.02, 0.1)

    def flipped(strength: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([True, strength > 0.1]), torch.tensor([True, False])

    curve = measure_curve(kl_at, flipped, 2, limits, 16.0)
    assert (curve.points[0].strength, curve.points[0].kl) == (0, 0)
    assert not curve.points[0].flips_any
    strengths = [point.strength for point in curve.points]
    assert strengths == sorted(strengths)
    for point in curve.points:
        assert point.kl == kl_at(point.strength) <= 0.1
    for limit in limits:
        nearest = max(point.kl for point in curve.points if point.kl <= limit)
        step = 0.7 if kl_at(16.0) > limit and kl_at(0.49) > 0 else 0.0
        assert nearest >= step * limit
    assert curve.flip_at(0.1) == 0.5
    rates = [curve.flip_at(limit, "total") for limit in limits]
    assert rates == sorted(rates)
    if kl_at(16.0) <= 0.1:  # the strength may grow as far as it is allowed to, without gaps
        assert strengths[-1] == 16
        assert all(high / low <= 4 for low, high in zip(strengths[1:], strengths[2:], strict=False))


def test_a_curve_ends_downwards_where_nothing_flips() -> None:
    measured: list[float] = []

    def flipped(strength: float) -> tuple[torch.Tensor, torch.Tensor]:
        measured.append(strength)
        return torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)

    curve = measure_curve(lambda s: s**2, flipped, 3, (0.01, 0.1), 16.0)
    assert all(0.07 <= strength**2 <= 0.1 for strength in measured)
    assert curve.flip_at(0.01) == curve.flip_at(0.1) == 0


# --- planted tasks -----------------------------------------------------------------------------------------


@pytest.fixture
def planted(dense) -> tuple[PromptTails, torch.Tensor]:
    """The last token's embedding is noise plus or minus one direction."""
    generator = torch.Generator().manual_seed(7)
    axis = torch.randn(32, generator=generator)
    axis = (axis - axis.mean()) / (axis - axis.mean()).norm()
    sign = torch.cat([torch.ones(24), -torch.ones(24)])
    with torch.no_grad():
        noise = 0.3 * torch.randn(48, 32, generator=generator)
        dense.model.transformer.wte.weight[20:68] = noise + 2 * sign[:, None] * axis
    ids = torch.stack([torch.full((48,), 5), torch.arange(20, 68)], 1)
    answer = torch.cat([torch.full((24,), 70), torch.full((24,), 71)])
    return PromptTails(dense, TaskBatch(ids, torch.ones(48).long(), answer, answer.roll(24))), axis


def test_means_and_probe_find_the_planted_direction(planted) -> None:
    tails, axis = planted
    for direction, sign in (("clean", -1), ("corrupted", 1)):
        means = difference_of_means(tails, Site(0, "resid_pre"), direction)
        torch.testing.assert_close(means.norm().item(), 4.0, atol=0.4, rtol=0)
        probe = probe_direction(tails, Site(0, "resid_pre"), direction, 0.01)
        for found in (means, probe):
            assert torch.cosine_similarity(found, sign * axis, dim=0) > 0.95


def test_the_dense_channel_that_carries_the_answer_is_found(dense) -> None:
    """The answer hangs on channel 5 before MLP 0, and nothing else is written."""
    with torch.no_grad():
        for block in dense.model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        first = dense.model.transformer.h[0]
        first.mlp.c_fc.weight[:, 0] = 0
        first.mlp.c_fc.weight[5, 0] = 3
        first.mlp.c_proj.weight[0] = dense.model.lm_head.weight[21] - dense.model.lm_head.weight[22]
        dense.model.transformer.wte.weight[11, 5] = 3
        dense.model.transformer.wte.weight[12, 5] = -3
    ids = torch.tensor([[11]] * 4 + [[12]] * 4)
    answer = torch.tensor([21] * 4 + [22] * 4)
    tails = PromptTails(dense, TaskBatch(ids, torch.zeros(8).long(), answer, answer.roll(4)))
    for direction, sign in (("clean", -1), ("corrupted", 1)):
        vector = best_channel(tails, Site(0, "resid_mid"), direction, 6.0, 4)
        assert vector.nonzero().flatten().tolist() == [5]
        assert vector[5] == sign * 6


def test_the_unembedding_difference_is_what_the_head_reads(dense) -> None:
    """A small step along it, before the final norm, moves the answers by its square."""
    tails = PromptTails(dense, pairs(dense))
    for direction in DIRECTIONS:
        one = select_prompts(tails, half(tails.batch, direction).nonzero()[2:3, 0])
        double = TaskBatch(
            one.batch.ids.repeat(2, 1),
            *(getattr(one.batch, name).repeat(2) for name in ("last", "answer", "distractor")),
        )
        vector = unembedding_difference(PromptTails(dense, double), "clean")
        step = 1e-2 / vector.norm()
        hook = dense.final_norm.register_forward_pre_hook(lambda m, args, d=step * vector: (args[0] + d,))
        with hooked(hook), torch.no_grad():
            moved = double.logit_difference(dense.model(double.ids).logits)[0] - one.unedited[0]
        assert moved.item() == pytest.approx(-(step * vector @ vector).item(), rel=0.02)


# --- the comparison ----------------------------------------------------------------------------------------


def test_an_edit_of_every_channel_of_an_exact_copy_is_the_difference_of_means(tokens) -> None:
    """In a family that reads the stream without a norm; so are its gate and its curves."""
    dense = DenseModel(tiny_model("OLMo 2"))
    edit, train, held_out, held_out_text, student, bridges = setup(
        dense, tokens, Site(1, "resid_pre"), range(32)
    )
    for direction in DIRECTIONS:
        found = all_steerings(edit, train, student, bridges, direction, CONFIG, seed=0)
        (whole,), (means,) = found["edit"], found["difference of means"]
        torch.testing.assert_close(whole.vector, means.vector, atol=1e-5, rtol=1e-5)
        prompts = EditedPrompts(held_out, edit.site, direction)
        for ways in ((whole, means), (whole.ungated(), means.ungated())):
            curves = [steered_curve(way, prompts, held_out_text, CONFIG) for way in ways]
            assert len(curves[0].points) == len(curves[1].points) > 1
            for own, other in zip(*(curve.points for curve in curves), strict=True):
                assert own.kl == pytest.approx(other.kl, abs=1e-5)
                assert own.strength == pytest.approx(other.strength, rel=1e-3)
                assert torch.equal(own.total, other.total)
                assert torch.equal(own.indirect, other.indirect)


def test_the_comparison_is_whole_and_its_rates_grow_with_the_limit(dense, tokens, tmp_path) -> None:
    parts = setup(dense, tokens, Site(0, "resid_mid"), range(3, 6))
    found = compare_alternatives(*parts, CONFIG)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["num_prompts"] == {"clean": 7, "corrupted": 7}
    assert found["lora_budget"]["rank"] == 3
    assert found["methods"].keys() == {
        "edit", "difference of means", "linear probe", "dense channel", "unembedding", "random nodes",
        "random directions", "LoRA",
    }  # fmt: skip
    for name, forms in found["methods"].items():
        assert set(forms) == ({"trained"} if name == "LoRA" else set(FORMS))
        for form in forms.values():
            for part in (form, *(form[direction] for direction in DIRECTIONS)):
                for rates in (part["flip_at"], part["flip_at_total"]):
                    assert list(rates) == ["0.01", "0.1", "1"]
                    assert list(rates.values()) == sorted(rates.values())
            curves = [form["clean"]["points"]] if "points" in form["clean"] else form["clean"]["draws"]
            assert len(curves) == (CONFIG.control_draws if name.startswith("random") else 1)
            for points in curves:
                nothing = {"strength": 0.0, "kl": 0.0, "flip_rate": 0.0, "flip_rate_indirect": 0.0}
                assert points[0] == nothing
                for limit in CONFIG.limits:
                    rate = max(p["flip_rate_indirect"] for p in points if p["kl"] <= limit)
                    if len(curves) == 1:
                        assert form["clean"]["flip_at"][f"{limit:g}"] == pytest.approx(rate)
    assert any(
        form["flip_at_total"]["1"] > 0 for forms in found["methods"].values() for form in forms.values()
    )
    for form in FORMS:
        rates = {
            name: found["methods"][name][form]["flip_at"]["1"] for name in ("edit", "difference of means")
        }
        row = found["against_difference_of_means"][form]["1"]
        assert row["edit"] == pytest.approx(rates["edit"])
        assert row["difference"]["value"] == pytest.approx(rates["edit"] - rates["difference of means"])
    table = alternatives_table(found).splitlines()
    assert len(table) == 2 + 7 * 2 + 1
    assert draw(tmp_path / "curves.svg", draw_alternatives, found)
    assert "difference of means" in (tmp_path / "curves.svg").read_text()


def test_only_what_is_asked_for_is_compared_and_comes_out_the_same(dense, tokens) -> None:
    parts = setup(dense, tokens, Site(0, "resid_mid"), range(3, 6))
    whole = compare_alternatives(*parts, CONFIG)
    few = compare_alternatives(*parts, CONFIG.model_copy(update={"methods": ("difference of means",)}))
    assert list(few["methods"]) == ["edit", "difference of means"]
    assert "lora_budget" not in few
    for name in ("methods", "against_difference_of_means"):
        assert few[name] == {key: whole[name][key] for key in few[name]}
    other = compare_alternatives(*parts, CONFIG.model_copy(update={"methods": ("linear probe",)}))
    assert list(other["methods"]) == ["edit", "linear probe"]
    assert "against_difference_of_means" not in other


def test_a_lora_that_cannot_be_is_undefined_with_the_reason(tokens) -> None:
    parts = setup(DenseModel(tiny_model("OLMo 2")), tokens, Site(1, "resid_mid"), range(2))
    found = compare_alternatives(*parts, CONFIG)
    assert "passes a norm" in found["methods"]["LoRA"]["undefined"]
    assert "passes a norm" in alternatives_table(found)


def test_random_nodes_are_others_of_the_same_site(dense, tokens) -> None:
    edit, train, _, _, _, bridges = setup(dense, tokens, Site(0, "resid_mid"), range(5))
    config = AlternativesConfig(control_draws=3)
    draws = random_nodes(edit, train, bridges, config, torch.Generator().manual_seed(0))
    assert [len(set(draw.nodes)) for draw in draws] == [5, 5, 5]
    assert {node.address for draw in draws for node in draw.nodes} == {"0.mlp.act_in"}
    assert not {node for draw in draws for node in draw.nodes} & set(edit.nodes)
    assert math.prod(draws[0].nodes != draw.nodes for draw in draws[1:])


def test_every_vector_gets_its_gate_in_the_same_way(dense, tokens) -> None:
    """The same vector and positions have the same gate, whichever method they come from."""
    edit, train, _, _, student, bridges = setup(dense, tokens, Site(0, "resid_mid"), range(3, 6))
    train_text = HeldOutText(dense, tokens)
    found = all_steerings(
        edit, train, student, bridges, "clean", CONFIG, seed=0, train_text=train_text, gate=GateConfig()
    )
    norm = difference_of_means(train, edit.site, "clean").norm()
    for name in ("edit", "linear probe", "random directions"):
        way = found[name][0]
        torch.testing.assert_close(way.vector.norm(), norm)
        at = acts_at(edit, train) if name == "edit" else told_apart(train.batch, train.resid[edit.site])
        again = fit_steering(way.vector, edit.site, at, train, train_text, "clean", (1.0,), GateConfig())
        assert torch.equal(again.steering.gate.direction, way.gate.direction)
        assert again.steering.gate.threshold == way.gate.threshold
