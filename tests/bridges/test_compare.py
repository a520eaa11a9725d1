"""Models side by side: identities with themselves and with copies, figures by hand, and a whole run."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bridges.checkpoint import DenseConfig
from bridges.compare import FIRST_TOKEN, ShowConfig, TextSample, compare_text, score_text
from bridges.compare_figures import calibration_bins, calibration_error, correlation_interval
from bridges.compare_table import code, comparison_tables
from bridges.compare_tasks import compare_task, of_dense, of_student
from bridges.dense import DenseModel
from bridges.edit import Edit
from bridges.edit_controls import measure_edit
from bridges.edit_table import best_strength
from bridges.evaluate import compare_on_text, measure_energies_
from bridges.run_models import RunModels
from bridges.search import EditConfig
from bridges.token_classes import CLASSES
from bridges.warm_start import StudentShape, make_student
from extractor.artifacts import fingerprint, write_json
from extractor.circuit import Calibration, Circuit, edges_between
from extractor.compact import node_widths
from extractor.data import DataConfig, TokenBlocks
from extractor.errors import InputError
from extractor.masks import mean_activations, save_means
from extractor.rotation import RotationConfig
from extractor.sites import Node
from extractor.student import Student
from extractor.tasks import encode_pairs, make_pairs
from tests.conftest import ROOT, tiny_gpt2
from tests.recipes.test_recipes import run_in_process

FEW = ShowConfig(worst=5, scatter=50, tokens_before=6, tokens_after=3)


@pytest.fixture(scope="module")
def dense(shipped_tokenizer) -> DenseModel:
    return DenseModel(tiny_gpt2(vocab_size=len(shipped_tokenizer), n_positions=128))


@pytest.fixture(scope="module")
def copy(dense: DenseModel):
    return make_student(dense, StudentShape(hidden_size=40), RotationConfig(enabled=False))[0]


@pytest.fixture(scope="module")
def other(dense: DenseModel):
    """A student that is another model."""
    student = make_student(dense, StudentShape(hidden_size=40), RotationConfig(enabled=False))[0]
    disturb_(student)
    return student


@torch.no_grad()
def disturb_(student: Student, density: float = 1.0) -> None:
    """Another model, with fewer edges if `density` is less than 1."""
    generator = torch.Generator().manual_seed(7)
    for matrix in student.sparse_matrices().values():
        matrix.add_(0.3 * matrix.std() * torch.randn(matrix.shape, generator=generator))
        matrix.mul_(torch.rand(matrix.shape, generator=generator) <= density)


@pytest.fixture(scope="module")
def sample(shipped_tokenizer) -> TextSample:
    """12 blocks of 32 tokens from four files."""
    ids: list[int] = []
    for name in ("gates", "clock", "errors", "sites"):
        text = (ROOT / "extractor" / f"{name}.py").read_text()[:1500]
        ids += [*shipped_tokenizer(text, add_special_tokens=False)["input_ids"], 0]
    blocks = np.array(ids[: len(ids) // 32 * 32], dtype=np.int32).reshape(-1, 32)
    return TextSample.spread(TokenBlocks(blocks, "none"), 12, shipped_tokenizer, "python")


def compared(dense, student, sample, tokenizer, config=FEW, **more):
    models = {"dense": of_dense(dense)[0], "student": of_student(student)[0], **more}
    return compare_text(models, sample, tokenizer, config, vocab_size=dense.config.vocab_size)


def at_rest(summary: dict, tolerance: float) -> None:
    """The figures of a model that is the reference."""
    for name in ("loss_difference", "kl"):
        ends = [summary[name][key] for key in ("value", "low", "high")]
        assert ends == pytest.approx([0, 0, 0], abs=tolerance)
    assert summary["top1_agreement"]["value"] == 1
    assert summary["loss_correlation"]["pearson"]["value"] == pytest.approx(1, abs=1e-6)
    assert summary["loss_correlation"]["spearman"] == pytest.approx(1, abs=max(1e-9, 10 * tolerance))


def test_the_dense_model_and_a_copy_of_it_differ_in_nothing(dense, copy, sample, shipped_tokenizer) -> None:
    models = compared(dense, copy, sample, shipped_tokenizer)["models"]
    at_rest(models["dense"]["overall"], 0)
    at_rest(models["student"]["overall"], 1e-5)
    assert models["dense"]["overall"]["calibration_error"] == pytest.approx(
        models["student"]["overall"]["calibration_error"], abs=1e-3
    )


def test_losses_of_classes_weighted_by_their_tokens_are_the_whole_loss(
    dense, other, sample, shipped_tokenizer
) -> None:
    found = compared(dense, other, sample, shipped_tokenizer)
    assert found["classes"] == list(CLASSES["python"])
    for entry in found["models"].values():
        parts = [part for part in entry["by_class"].values() if part["tokens"]]
        assert len(parts) > 5
        total = sum(part["tokens"] for part in parts)
        assert total == entry["overall"]["tokens"] == found["counts"]["scored"]
        for name in ("loss", "kl", "loss_difference", "top1_agreement"):
            weighted = sum(part["tokens"] * part[name]["value"] for part in parts) / total
            assert weighted == pytest.approx(entry["overall"][name]["value"], abs=1e-9)
        assert sum(row["count"] for row in entry["calibration_bins"]) == total
    assert all(
        "undefined" in found["models"]["student"]["by_class"]["other"][name] for name in ("loss", "kl")
    )


def test_losses_are_those_of_the_evaluation(dense, other, sample, shipped_tokenizer) -> None:
    found = compared(dense, other, sample, shipped_tokenizer)["models"]
    expected = compare_on_text(dense, other, sample.ids)
    assert found["dense"]["overall"]["loss"]["value"] == pytest.approx(expected["dense_ce"], abs=1e-5)
    assert found["student"]["overall"]["loss"]["value"] == pytest.approx(expected["ce"], abs=1e-5)
    gap = found["student"]["overall"]["loss_difference"]
    assert gap["value"] == pytest.approx(expected["ce"] - expected["dense_ce"], abs=1e-5)
    assert gap["low"] < gap["value"] < gap["high"]
    assert gap["clusters"] == len(sample.document[:, 1:].unique())


def test_figures_by_hand() -> None:
    """Two tokens to predict in a block; four words; the dense model is even, the other one sure of word 1."""
    ids = torch.tensor([[0, 1, 2]])
    blank = torch.zeros_like(ids)
    sample = TextSample(ids, None, blank, blank, "text", planned_blocks=3)
    even = torch.zeros(1, 3, 4)
    sure = torch.tensor([0.1, 0.7, 0.1, 0.1]).log().expand(1, 3, 4)
    records = score_text({"dense": lambda *_: even, "student": lambda *_: sure}, sample, 4, "cpu")
    torch.testing.assert_close(records["dense"].loss, torch.full((1, 2), math.log(4)))
    torch.testing.assert_close(records["student"].loss, -torch.tensor([[0.7, 0.1]]).log())
    kl = sum(0.25 * math.log(0.25 / p) for p in (0.1, 0.7, 0.1, 0.1))
    torch.testing.assert_close(records["student"].kl, torch.full((1, 2), kl))
    assert records["student"].agrees.tolist() == [[False, False]]  # the even one's first of equals is word 0
    assert records["student"].is_right.tolist() == [[True, False]]
    assert sample.counts(torch.tensor([[True, False]])) == {
        "planned": 9, "run": 3, "scored": 1, "excluded": 8,
        "reasons": [
            {"reason": "the held-out text has fewer blocks than planned", "count": 6},
            {"reason": FIRST_TOKEN, "count": 1},
            {"reason": "the logits of a model are not finite", "count": 1},
        ],
    }  # fmt: skip


def test_the_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.1, 0.2, 0.55, 0.9, 1.0], dtype=torch.float64)
    is_right = torch.tensor([False, True, True, True, False])
    rows = calibration_bins(confidence, is_right, 5)
    assert [(row["low"], row["count"], row["accuracy"]) for row in rows] == [
        (0.0, 2, 0.5), (0.4, 1, 1.0), (0.8, 2, 0.5),
    ]  # fmt: skip
    assert calibration_error(rows) == pytest.approx((2 * 0.35 + 0.45 + 2 * 0.45) / 5)
    assert calibration_error([]) == {"undefined": "no examples"}


def test_a_correlation_has_an_interval_over_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    a, noise = torch.randn(2, 400, generator=generator)
    cluster = torch.arange(400) // 20
    found = correlation_interval(a, a + noise, cluster, seed=0)
    assert found["low"] < found["value"] < found["high"]
    assert found["value"] == pytest.approx(np.corrcoef(a, a + noise)[0, 1], abs=1e-6)
    assert found["low"] < 0.5**0.5 < found["high"]
    same = correlation_interval(a, a, cluster, seed=0)
    assert [same[key] for key in ("value", "low", "high")] == [pytest.approx(1)] * 3
    assert "undefined" in correlation_interval(a, a, cluster // 4, seed=0)["low"]
    assert "undefined" in correlation_interval(a, torch.ones(400), cluster, seed=0)


def test_the_worst_token_stands_first_in_its_own_context(dense, other, sample, shipped_tokenizer) -> None:
    found = compared(dense, other, sample, shipped_tokenizer)
    records = score_text(
        {"dense": of_dense(dense)[0], "student": of_student(other)[0]}, sample, dense.config.vocab_size, "cpu"
    )
    gaps = (records["student"].loss - records["dense"].loss).abs()
    for key, measure in (("by_kl", records["student"].kl), ("by_loss_difference", gaps)):
        rows = found["worst"][key]
        places = [(row["block"], row["position"] - 1) for row in rows]
        assert [measure[place].item() for place in places] == measure.flatten().topk(5).values.tolist()
        for row in rows:
            ids = sample.ids[row["block"]]
            assert row["token"] == shipped_tokenizer.decode(ids[row["position"]])
            assert row["before"] + row["token"] + row["after"] in shipped_tokenizer.decode(ids)
            assert row["class"] in CLASSES["python"]
            context = ids[: row["position"]]
            top = dense.run(context[None], record=False).logits[0, -1].softmax(-1).topk(3)
            shown = row["top"]["dense"]
            assert [entry["token"] for entry in shown] == [shipped_tokenizer.decode(i) for i in top.indices]
            assert [entry["probability"] for entry in shown] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_what_is_not_finite_is_excluded_and_counted(dense, copy, sample, shipped_tokenizer) -> None:
    def broken(ids, at):
        logits = copy(ids, position_ids=at).logits.clone()
        logits[:, 4] = torch.nan  # of every block
        return logits

    found = compared(dense, copy, sample, shipped_tokenizer, broken=broken)
    counts, blocks = found["counts"], len(sample.ids)
    assert counts["excluded"] == sum(row["count"] for row in counts["reasons"]) == 2 * blocks
    assert (
        counts["scored"] == found["models"]["broken"]["overall"]["tokens"] == sample.ids.numel() - 2 * blocks
    )
    assert found["scatter"]["of"] == counts["scored"]
    assert len(found["scatter"]["points"]) == found["scatter"]["shown"] == 50
    json.dumps(found, allow_nan=False)


def test_documents_are_kept_apart_where_their_positions_are(dense, copy, shipped_tokenizer) -> None:
    text = shipped_tokenizer("def f(x): return x\n", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([*text, 0, *text, 0])[None].int()
    blocks = TokenBlocks(ids.numpy(), "none", end_of_text=0)
    apart = TextSample.spread(blocks, 1, shipped_tokenizer, "python")
    loss = score_text({"dense": of_dense(dense)[0], "student": of_student(copy)[0]}, apart, 2048, "cpu")
    own, first = loss["student"].loss[0], len(text)
    torch.testing.assert_close(own[:first], own[first + 1 :], atol=1e-4, rtol=1e-4)
    joined = TextSample.spread(replace(blocks, end_of_text=None), 1, shipped_tokenizer, "python")
    with_context = score_text({"dense": of_dense(dense)[0]}, joined, 2048, "cpu")["dense"].loss[0]
    assert (with_context[first + 1 :] - own[first + 1 :]).abs().max() > 1e-2


def test_on_a_task_a_model_and_a_copy_of_it_differ_in_nothing(dense, copy, shipped_tokenizer) -> None:
    pairs = make_pairs("with_as", shipped_tokenizer, split="held_out", count=6, seed=0, max_tokens=128)
    prompts = encode_pairs(pairs, shipped_tokenizer)
    models = {"dense": of_dense(dense)[1], "student": of_student(copy)[1], "circuit": of_student(copy)[1]}
    doubled = Calibration(scale=2.0, shift=0.0)
    found = compare_task(models, prompts, pairs, FEW, vocab_size=2048, calibration=doubled)
    assert found["counts"] == {"planned": 12, "run": 12, "scored": 12, "excluded": 0, "reasons": []}
    differences = prompts.logit_difference(dense.run(prompts.ids, record=False).logits)
    for name, tolerance in (("dense", 0), ("student", 1e-4)):
        summary = found["models"][name]
        assert summary["accuracy"]["value"] == pytest.approx((differences > 0).double().mean().item())
        against = summary["against"]["dense"]
        for key in ("loss_difference", "accuracy_difference", "logit_difference", "kl"):
            assert against[key]["value"] == pytest.approx(0, abs=tolerance)
        assert against["same_answer"]["value"] == against["top1_agreement"]["value"] == 1
        assert against["difference_correlation"]["pearson"] == pytest.approx(1, abs=1e-5)
    circuit = found["models"]["circuit"]
    assert circuit["logit_difference"]["value"] == pytest.approx(2 * differences.mean().item(), abs=1e-4)
    assert circuit["against"]["student"]["kl"]["value"] == 0  # of the logits as they are
    worst = found["worst"]
    assert [abs(row["gap"]) for row in worst] == sorted((abs(row["gap"]) for row in worst), reverse=True)
    for row in worst:
        ids = shipped_tokenizer(row["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        logits = dense.run(ids, record=False).logits[0, -1]
        answer, distractor = (
            shipped_tokenizer(row[key], add_special_tokens=False)["input_ids"][0]
            for key in ("answer", "distractor")
        )
        expected = (logits[answer] - logits[distractor]).item()
        assert row["logit_difference"]["dense"] == pytest.approx(expected, abs=1e-4)


def test_the_best_strength_is_the_least_that_flips_most() -> None:
    assert best_strength([0.0, 0.5, 1.0, 2.0], [0.0, 0.3, 0.8, 1.0]) == 1.0
    assert best_strength([0.0, 0.5, 1.0, 2.0], [0.0, 0.3, 0.6, 0.4]) == 1.0
    assert best_strength([0.0, 0.5, 1.0], [0.0, 0.0, 0.0]) == 0.5
    with pytest.raises(InputError, match="no strength but zero"):
        best_strength([0.0], [0.0])


def test_text_in_a_table_cannot_leave_its_cell() -> None:
    for text in ("a|b", "`", "``x", "\n</script>\u202e", "\\", '"', ""):
        shown = code(text)
        assert shown.isascii()
        assert "\n" not in shown
        assert "|" not in shown.replace("\\|", "")
        assert shown.startswith("`")
        assert shown.endswith("`")


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose circuit of with_as is the whole student, with an edit; its other circuit is empty."""
    folder = tmp_path_factory.mktemp("compare") / "run"
    dense = DenseModel.from_pretrained(str(tiny_checkpoint), plain=True)
    student, bridges = make_student(dense, StudentShape(hidden_size=40), RotationConfig(enabled=False))
    disturb_(student, 0.1)
    blocks = torch.randint(1, 2048, (4, 32), generator=torch.Generator().manual_seed(5))
    measure_energies_(dense, student, bridges, blocks)
    student.save_pretrained(folder / "student")
    dense.tokenizer.save_pretrained(folder / "student")
    bridges.save_pretrained(folder / "bridges", dense_sha256=dense.sha256)
    widths = node_widths(student.config)
    everything = frozenset(Node(name, channel) for name in widths for channel in range(widths[name]))
    for task, nodes in (("with_as", everything), ("bracket_paren", frozenset())):
        settings = {"prompts": task, "ablation": "mean"}
        edges = edges_between(student, nodes)
        circuit = Circuit(task, nodes, edges, fingerprint(folder / "student"), settings)
        circuit.save(folder / "circuits" / f"{task}.json")
    means = mean_activations(student, blocks)
    facts = {"student_sha256": fingerprint(folder / "student"), "train_text_sha256": "0" * 64}
    save_means(folder / "circuits" / "means.safetensors", means, facts)
    data = DataConfig(source=str(ROOT / "extractor"), held_out_frac=0.3, context_length=32)
    extraction = {"data": data.model_dump(mode="json"), "mean_blocks": 8}
    write_json(folder / "manifest.json", {"schema_version": 1, "extract": {"config": extraction}})
    save_edit(folder, str(tiny_checkpoint))
    return folder


def save_edit(run: Path, dense: str) -> None:
    """Most channels that the first attention reads, saved and measured as recipes/edit.py does."""
    models = RunModels(run, DenseConfig(path=dense), torch.device("cpu"))
    site = models.bridges.sites[0]
    nodes = [Node(site.read_address, channel) for channel in range(30)]
    edit = replace(Edit.from_nodes(nodes, site, models.bridges), hashes=models.hashes)
    streams = models.streams(models.prompts(models.circuits["with_as"], "held_out", 8))
    config = EditConfig(strengths=(0.0, 1.0, 50.0), control_draws=1)
    found = measure_edit(streams, edit, models.bridges, config, seed=0)
    edit = replace(edit, refusals=("off-target KL too large",))
    form = {"direction": "clean", "strength": 2.0, "cut": 0.5, "train_text_blocks": 4}
    edit.save(run / "edits" / "with_as", {"task": "with_as", **found, "steering_form": form})


def test_a_run_is_compared_on_text_and_on_tasks(run: Path, tiny_checkpoint: Path, monkeypatch) -> None:
    arguments = ["--run", run, "--dense.path", tiny_checkpoint, "--held_out_pairs", "8"]
    tasks = "[with_as, bracket_paren, else_elif]"
    run_in_process(
        monkeypatch, "compare", *arguments, "--train_pairs", "8", "--text_blocks", "4", "--tasks", tasks
    )
    found = json.loads((run / "compare.json").read_text(), parse_constant=pytest.fail)
    text, tasks = found["text"], found["tasks"]
    assert text["counts"]["planned"] == 4 * 32 == text["counts"]["scored"] + text["counts"]["excluded"]
    assert text["kind"] == "python"
    # a circuit of every node and edge is the student, and one of none is not a model
    student, whole = (text["models"][name]["overall"] for name in ("student", "circuit:with_as"))
    assert whole["loss"]["value"] == pytest.approx(student["loss"]["value"], abs=1e-4)
    assert whole["kl"]["value"] == pytest.approx(student["kl"]["value"], abs=1e-4)
    assert "empty" in text["models"]["circuit:bracket_paren"]["undefined"]
    assert "no edit" in text["models"]["edited:bracket_paren"]["undefined"]
    against = tasks["with_as"]["models"]["circuit"]["against"]["student"]
    assert against["logit_difference"]["value"] == pytest.approx(0, abs=1e-3)
    assert against["same_answer"]["value"] == 1
    # the edit does what its own file says of the same prompts
    edit = json.loads((run / "edits" / "with_as" / "edit.json").read_text())
    mine = tasks["with_as"]["edit"]
    rate = edit["flip_rate"][edit["strengths"].index(mine["strength"])]
    assert rate > 0
    assert tasks["with_as"]["models"]["edited"]["flips"]["value"] == pytest.approx(rate)
    assert tasks["with_as"]["models"]["edited"]["flips"]["n"] == edit["num_right_before"]
    assert mine["refusals"] == ["off-target KL too large"]
    assert text["models"]["edited:with_as"]["overall"]["kl"]["value"] > 0
    assert "no circuit" in tasks["else_elif"]["models"]["circuit"]["undefined"]
    assert "no circuit" in tasks["else_elif"]["edit"]["undefined"]
    written = json.loads((run / "manifest.json").read_text())["compare"]["outputs"]
    assert set(written) == {"compare.json", "compare.md"}
    assert (run / "compare.md").read_text() == comparison_tables(found)


def test_a_circuit_found_with_other_means_is_refused(
    run: Path, tiny_checkpoint, tmp_path, monkeypatch, capsys
) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    path = copied / "circuits" / "with_as.json"
    replace(Circuit.load(path), hashes={"train_text_sha256": "1" * 64}).save(path)
    arguments = ["--run", copied, "--dense.path", tiny_checkpoint, "--text_blocks", "2"]
    with pytest.raises(SystemExit) as stopped:
        run_in_process(monkeypatch, "compare", *arguments, "--tasks", "[with_as]")
    assert stopped.value.code == 3
    assert "circuit 'with_as' was found with other means" in capsys.readouterr().err


def test_a_folder_that_was_not_extracted_is_refused(run: Path, tiny_checkpoint, tmp_path, capsys) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["extract"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    for bad, code_, words in ((["--tasks", "[nothing]"], 2, "unknown task"), ([], 3, "recipes/extract.py")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            run_in_process(patch, "compare", "--run", copied, "--dense.path", tiny_checkpoint, *bad)
        assert ended.value.code == code_
        assert words in capsys.readouterr().err.splitlines()[-1]
