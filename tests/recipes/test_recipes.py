"""The recipes run for real, as a user starts them, on a tiny checkpoint."""

import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from bridges.checkpoint import DenseConfig
from bridges.dense import DenseModel
from bridges.evaluate import compare_on_text
from bridges.replay import replay
from bridges.report import write_report
from bridges.run_models import run_text
from bridges.verify import verify
from extractor.artifacts import file_sha256, fingerprint
from extractor.circuit import Circuit, edges_between
from extractor.data import DataConfig
from extractor.sites import Node
from extractor.student import load_student
from tests.conftest import ROOT

SMALL_TEXT = ["--data.source", str(ROOT / "extractor"), "--data.held_out_frac", "0.3"]
SMALL_TEXT += ["--data.context_length", "32"]
TRAIN = [
    *SMALL_TEXT, "--rotation.stream_steps", "20", "--rotation.head_steps", "10", "--precision", "fp32",
    "--max_steps", "8", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_steps", "2",
    "--eval_blocks", "16", "--bridge_eval_blocks", "8",
]  # fmt: skip
EXTRACT = [
    *SMALL_TEXT, "--tasks", "[with_as, bracket_paren]", "--mean_blocks", "16", "--held_out_pairs", "8",
    "--evidence.random_circuits", "2", "--evidence.random_pairs", "4", "--evidence.adversary.steps", "2",
    "--controls.nonsense", "1", "--prune.steps", "10", "--prune.train_pairs", "16",
    "--prune.selection_pairs", "16", "--prune.pairs_per_step", "8",
]  # fmt: skip
EDIT = [
    *SMALL_TEXT, "--train_pairs", "8", "--held_out_pairs", "8", "--other_pairs", "4", "--text_blocks", "4",
    "--edit.control_draws", "1", "--edit.max_size", "4", "--audit.prediction.nodes", "3",
    "--audit.prediction.sets", "2", "--audit.prediction.pairs", "4",
]  # fmt: skip

AUDIT = ["--held_out_pairs", "8", "--desk.nodes", "2", "--desk.pairs", "1"]


def run_in_process(monkeypatch: pytest.MonkeyPatch, verb: str, *arguments: object) -> None:
    AcceleratorState._reset_state()  # the precision of an earlier recipe in this process
    monkeypatch.setattr(sys, "argv", [f"{verb}.py", *map(str, arguments)])
    precision = torch.get_float32_matmul_precision()
    try:
        runpy.run_path(str(ROOT / "recipes" / f"{verb}.py"), run_name="__main__")
    finally:
        torch.set_float32_matmul_precision(precision)  # last bits of the tests that follow hang on it


def open_every_read(run: Path) -> None:
    """Circuits to make edits from: a student of random weights does no task, so none were found."""
    student, _ = load_student(run / "student")
    reads = [site.read_address for site in student.sites]
    nodes = frozenset(Node(read, channel) for read in reads for channel in range(student.config.hidden_size))
    manifest = json.loads((run / "manifest.json").read_text())
    for path in (run / "circuits").glob("*.json"):
        circuit = replace(Circuit.load(path), nodes=nodes, edges=edges_between(student, nodes))
        counts = {"nodes": len(nodes), "edges": len(circuit.edges)}
        replace(circuit, evidence=circuit.evidence | counts).save(path)
        manifest["extract"]["outputs"][f"circuits/{path.name}"] = file_sha256(path)
    (run / "manifest.json").write_text(json.dumps(manifest))


def start(*command: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(recipe: str, *arguments: object) -> subprocess.Popen:
    """A recipe on two gloo processes."""
    two = ("accelerate", "launch", "--config_file", "recipes/accelerate/cpu2.yaml")
    return start(*two, f"recipes/{recipe}.py", *arguments)


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after train, extract, edit and audit."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        dense = ["--dense.path", tiny_checkpoint, "--run", run]
        run_in_process(monkeypatch, "train", *dense, *TRAIN)
        run_in_process(monkeypatch, "extract", "--run", run, *EXTRACT)
        open_every_read(run)
        run_in_process(monkeypatch, "edit", *dense, *EDIT)
        run_in_process(monkeypatch, "audit", *dense, *AUDIT)
    return run


def test_whole_job_leaves_every_artefact(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.yaml", "manifest.json", "metrics.jsonl", "evaluation.json", "student", "bridges",
        "circuits", "circuits.md", "thresholds.json", "edits", "edits.md", "report.json",
        "report.html", "report.intoto.json", "README.md", "figures",
    }  # fmt: skip
    assert {path.name for path in (trained / "figures").iterdir()} == {"steering.svg", "inverse.svg"}
    for path in trained.rglob("*"):
        assert path.suffix not in {".bin", ".pkl", ".pt", ".pickle"}
        assert not path.name.startswith(".tmp-")


def test_report_holds_what_the_issue_asks_for(trained: Path) -> None:
    report = json.loads((trained / "report.json").read_text())
    assert report["dense"]["ce"] > 0
    student = report["student"]
    assert student["init_kl_dense"] <= 1e-6
    assert student["density"] == 0.125
    assert student["nonzeros"] < student["parameters"]
    for matrix in student["matrices"].values():
        assert matrix["nonzeros"] == matrix["k"] == round(0.125 * matrix["shape"][0] * matrix["shape"][1])
    assert set(report["bridges"]) == {"0.resid_pre", "0.resid_mid", "1.resid_pre", "1.resid_mid"}
    for row in report["bridges"].values():
        assert set(row) == {"nmse_encode", "nmse_decode", "kl_dense_to_sparse", "kl_sparse_to_dense"}
    assert set(report["circuits"]) == {"with_as", "bracket_paren"}
    for circuit in report["circuits"].values():
        wanted = {"nodes", "edges", "nodes_total", "loss", "accuracy", "sufficiency", "necessity"}
        assert wanted <= set(circuit)
    for edit in report["edits"].values():
        lists = ("flip_rate", "flip_rate_indirect", "control_random_node", "control_random_direction")
        assert {"site", "nodes", "size"} <= set(edit)
        for name in lists:
            assert len(edit[name]) == len(edit["strengths"])
    assert report["provenance"]["artifacts"]["student/model.safetensors"]
    assert len(report["criteria"]) == 5
    assert len(report["mixtures"]["paths"]) > 16  # 64 draws over 4 sites and two beginnings
    page = (trained / "report.html").read_text()
    assert "random mixtures" in page
    assert f"{len(report['mixtures']['paths'])} random mixtures" in page


def test_a_report_verifies_and_fits_its_schema(trained: Path) -> None:
    assert verify(trained) == 0
    report = json.loads((trained / "report.json").read_text())
    desk = report["desk"]["with_as"]
    assert len(desk["nodes"]) == 2
    assert len(desk["dense"][0]) == len(desk["settings"]) == 5
    accounts = {row["what"]: row for row in report["accounting"]}
    assert accounts["tasks with an edit"]["scored"] == len(report["edits"]) == 2
    assert all(row["planned"] == row["scored"] + row["excluded"] for row in accounts.values())
    statement = json.loads((trained / "report.intoto.json").read_text())
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    assert subjects["report.html"] == file_sha256(trained / "report.html")


def test_a_replay_gives_the_same_claims_and_tells_when_it_does_not(
    trained: Path, tiny_checkpoint, tmp_path, monkeypatch, capsys
) -> None:
    run = shutil.copytree(trained, tmp_path / "copy")
    record = json.loads((run / "report.json").read_text())
    for circuit in record["circuits"].values():
        circuit["loss"] += 0.01
    write_report(record, run)
    assert replay(run, sample=1) == 7
    assert "DIFFERS   circuit of" in capsys.readouterr().out
    shutil.rmtree(run / "circuits")
    run_in_process(monkeypatch, "extract", "--run", run, *EXTRACT)
    run_in_process(monkeypatch, "audit", "--dense.path", tiny_checkpoint, "--run", run, *AUDIT)
    capsys.readouterr()
    assert replay(run, sample=1) == 0
    shown = capsys.readouterr().out
    assert "tasks replayed: 1 of 2" in shown
    assert "agrees    edit of" in shown
    assert "agrees    verdict of the report" in shown
    record = json.loads((run / "report.json").read_text())
    record["dense"]["tasks"]["with_as"]["loss"] += 0.01
    write_report(record, run)
    assert replay(run, sample=1) == 7
    assert "DIFFERS   dense on with_as, loss" in capsys.readouterr().out


def test_saved_circuits_count_their_own_edges(trained: Path) -> None:
    circuit = Circuit.load(trained / "circuits" / "with_as.json")
    assert circuit.evidence["nodes"] == len(circuit.nodes)
    assert circuit.evidence["edges"] == len(circuit.edges)


def test_metrics_have_one_line_a_step(trained: Path) -> None:
    assert [row["step"] for row in metrics_of(trained)] == list(range(1, 9))


def test_a_changed_artefact_is_not_reported_on(trained: Path, tiny_checkpoint, tmp_path, capsys) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", trained, copy], check=True)
    path = copy / "circuits" / "with_as.json"
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(SystemExit) as stopped, pytest.MonkeyPatch.context() as monkeypatch:
        run_in_process(
            monkeypatch, "audit", "--dense.path", tiny_checkpoint, "--run", copy, "--held_out_pairs", 4
        )
    assert stopped.value.code == 3
    assert "is not the file that recipes/extract.py wrote" in capsys.readouterr().err


def test_view_at_density_one_is_exact_and_untrained(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    run = tmp_path / "view"
    run_in_process(
        monkeypatch,
        "train",
        "--dense.path",
        tiny_checkpoint,
        "--run",
        run,
        *TRAIN,
        "--sparsity.density",
        "1.0",
    )
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["student"]["train_tokens"] == 0
    assert abs(evaluation["student"]["kl_dense"]) <= 1e-6
    assert max(abs(v) for row in evaluation["bridges"].values() for v in row.values()) < 1e-5


def test_half_size_files_hold_what_was_evaluated(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    run = tmp_path / "half"
    arguments = ["--dense.path", tiny_checkpoint, "--run", run, *TRAIN, "--save_dtype", "bfloat16"]
    run_in_process(monkeypatch, "train", *arguments)
    assert {w.dtype for w in load_file(run / "student" / "model.safetensors").values()} == {torch.bfloat16}
    bridges = load_file(run / "bridges" / "bridges.safetensors")
    kept = {name for name, tensor in bridges.items() if tensor.dtype == torch.float32}
    assert kept == {"dense_energy", "sparse_energy"}  # measured, not learned
    config = yaml.safe_load((run / "config.yaml").read_text())
    dense = DenseModel.from_pretrained(DenseConfig(path=str(tiny_checkpoint)))
    text, limit = DataConfig(**config["data"]), config["max_train_tokens"]
    _, held_out = run_text(text, dense, limit, config["eval_blocks"])
    blocks = held_out.sample(config["eval_blocks"])
    student = json.loads((run / "evaluation.json").read_text())["student"]
    found = compare_on_text(dense, load_student(run / "student")[0], *blocks)
    assert found["ce"] == pytest.approx(student["ce"], abs=1e-6)
    assert found["kl_dense"] == pytest.approx(student["kl_dense"], abs=1e-6)


def test_a_quantised_dense_model_is_trained_against_and_its_plain_self_copied(
    tiny_llama_checkpoint, tmp_path, monkeypatch
) -> None:
    """The student starts as a copy of the plain weights; the distance of the quantised ones is recorded."""
    run = tmp_path / "quantised"
    dense = ["--dense", tiny_llama_checkpoint, "--dense.quantization", "8bit", "--run", run]
    run_in_process(monkeypatch, "train", *dense, *TRAIN)
    evaluation = json.loads((run / "evaluation.json").read_text())
    placement = evaluation["dense"]["placement"]
    assert (placement["quantization"], placement["adapter"]) == ("8bit", None)
    assert 1e-7 < placement["probe_kl"] < 0.05
    assert placement["probe_max_logit_error"] > 1e-3
    assert evaluation["student"]["init_kl_dense"] <= 1e-6
    inputs = json.loads((run / "manifest.json").read_text())["train"]["inputs"]["dense"]
    plain = DenseModel.from_pretrained(tiny_llama_checkpoint)
    assert inputs["sha256"] == evaluation["dense"]["sha256"] == plain.sha256
    run_in_process(monkeypatch, "audit", *dense, "--held_out_pairs", 4)
    report = json.loads((run / "report.json").read_text())
    assert report["method"]["replay"].splitlines() == [
        f"accelerate launch recipes/{recipe}.py --config {recipe}.yaml" for recipe in ("train", "audit")
    ]
    for part in report["method"]["config"].split("# train.yaml\n")[1].split("# audit.yaml\n"):
        dense_settings = yaml.safe_load(part)["dense"]
        assert dense_settings["path"] == str(tiny_llama_checkpoint)
        assert dense_settings["quantization"] == "8bit"
    assert "with quantization 8bit" in (run / "report.html").read_text()


def test_edits_are_chosen_and_measured_in_full_precision(
    trained, tiny_checkpoint, tmp_path, monkeypatch
) -> None:
    """Asked for with a quantised dense model, an edit is the same to the last bit."""
    run = shutil.copytree(trained, tmp_path / "copy")
    path = run / "edits" / "with_as" / "edit.json"
    before = path.read_bytes()
    path.unlink()
    quantised = ["--dense.path", tiny_checkpoint, "--dense.quantization", "4bit"]
    run_in_process(monkeypatch, "edit", *quantised, "--run", run, "--tasks", "[with_as]", *EDIT)
    assert path.read_bytes() == before


@pytest.mark.parametrize("verb", ["compare", "audit"])
def test_circuits_of_which_the_run_does_not_tell_are_refused(
    verb, trained, tiny_checkpoint, tmp_path, monkeypatch, capsys
) -> None:
    run = shutil.copytree(trained, tmp_path / "copy")
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["extract"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit) as stopped:
        run_in_process(monkeypatch, verb, "--dense.path", tiny_checkpoint, "--run", run)
    assert stopped.value.code == 3
    assert "says nothing of recipes/extract.py" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("verb", ["edit", "audit"])
def test_another_tokenizer_or_other_weights_are_refused_after_training(
    verb, trained, tiny_checkpoint, tmp_path, monkeypatch, capsys
) -> None:
    changed = shutil.copytree(tiny_checkpoint, tmp_path / "changed")
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (token for token, index in vocabulary.items() if index in (600, 601))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SystemExit) as stopped:
        run_in_process(monkeypatch, verb, "--dense.path", changed, "--run", trained)
    assert stopped.value.code == 3
    assert f"tokenizers of '{trained / 'student'}'" in capsys.readouterr().err


def test_row_7_a_flipped_bit_of_the_dense_weights_is_refused_after_training(
    trained, tiny_checkpoint, tmp_path, monkeypatch, capsys
) -> None:
    changed = shutil.copytree(tiny_checkpoint, tmp_path / "changed")
    content = bytearray((changed / "model.safetensors").read_bytes())
    content[-7] ^= 1
    (changed / "model.safetensors").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        run_in_process(monkeypatch, "edit", "--dense.path", changed, "--run", trained, *EDIT)
    assert stopped.value.code == 3
    assert "the bridges in" in capsys.readouterr().err


def test_abs_topk_anneals_from_an_exact_copy(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    run = tmp_path / "topk"
    run_in_process(
        monkeypatch,
        "train",
        "--dense.path",
        tiny_checkpoint,
        "--run",
        run,
        *TRAIN,
        "--student.activation_frac",
        "0.25",
    )
    student = json.loads((run / "evaluation.json").read_text())["student"]
    assert student["init_kl_dense"] <= 1e-6
    assert student["activation_frac"] == 0.25
    assert json.loads((run / "student" / "config.json").read_text())["activation_frac"] == 0.25


def test_a_run_goes_on_from_a_finished_one(trained, tiny_checkpoint, tmp_path, monkeypatch, capsys) -> None:
    """Without a step it is that run's student to the bit; with some, density falls from that student's."""
    arguments = ["--dense.path", tiny_checkpoint, *TRAIN, "--from_run", trained]
    same, sparser = tmp_path / "same", tmp_path / "sparser"
    run_in_process(monkeypatch, "train", *arguments, "--run", same, "--max_steps", "0")
    for name in ("student/model.safetensors", "bridges/bridges.safetensors"):
        before, after = load_file(trained / name), load_file(same / name)
        assert all(torch.equal(before[key], after[key]) for key in before), name
    evaluations = [json.loads((run / "evaluation.json").read_text()) for run in (trained, same)]
    for key in ("ce", "kl_dense", "nonzeros", "train_tokens"):
        assert evaluations[0]["student"][key] == evaluations[1]["student"][key], key
    assert evaluations[0]["bridges"] == evaluations[1]["bridges"]

    run_in_process(monkeypatch, "train", *arguments, "--run", sparser, "--sparsity.density", "0.03125")
    densities = [row["density"] for row in metrics_of(sparser)]
    assert densities[0] < 0.125
    assert densities[-1] == pytest.approx(0.03125)
    student = json.loads((sparser / "evaluation.json").read_text())["student"]
    assert student["train_tokens"] == 2 * evaluations[0]["student"]["train_tokens"]
    assert all(m["nonzeros"] == m["k"] <= 0.04 * math.prod(m["shape"]) for m in student["matrices"].values())
    origin = json.loads((sparser / "manifest.json").read_text())["train"]["inputs"]["from_run"]
    assert (origin["density"], origin["student_sha256"]) == (0.125, fingerprint(trained / "student"))

    for changed, code, message in (
        (["--sparsity.density", "0.5"], 2, "(from_run) has 0.125; at most that"),
        (["--student.intermediate_size", "512"], 2, "student.* is taken from"),
        (["--from_run", "/nowhere/run"], 3, "from_run: no finished run in '/nowhere/run'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_in_process(monkeypatch, "train", *arguments, "--run", tmp_path / "refused", *changed)
        assert stopped.value.code == code
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "refused").exists()


def test_abs_topk_is_kept_by_a_run_that_goes_on(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = ["--dense.path", tiny_checkpoint, *TRAIN]
    topk = ["--student.activation_frac", "0.25"]
    run_in_process(monkeypatch, "train", *arguments, *topk, "--run", first)
    run_in_process(monkeypatch, "train", *arguments, "--from_run", first, "--run", second)
    before, after = (json.loads((run / "evaluation.json").read_text())["student"] for run in (first, second))
    assert after["activation_frac"] == 0.25
    assert after["init_kl_dense"] == pytest.approx(before["kl_dense"], abs=0.2)  # other held-out blocks
    assert json.loads((second / "student" / "config.json").read_text())["activation_frac"] == 0.25


def test_a_finished_run_is_kept_and_another_config_refused(
    trained, tiny_checkpoint, monkeypatch, capsys
) -> None:
    before = (trained / "student" / "model.safetensors").stat().st_mtime_ns
    arguments = ["--dense.path", tiny_checkpoint, "--run", trained, *TRAIN]
    run_in_process(monkeypatch, "train", *arguments)
    assert "already trained" in capsys.readouterr().out
    assert (trained / "student" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SystemExit) as stopped:
        run_in_process(monkeypatch, "train", *arguments, "--optimizer.learning_rate", "0.5")
    assert stopped.value.code == 3
    assert "holds a run with another config" in capsys.readouterr().err


def test_divergence_ends_in_its_own_code(tiny_checkpoint, tmp_path, monkeypatch, capsys) -> None:
    run = tmp_path / "diverged"
    with pytest.raises(SystemExit) as stopped:
        run_in_process(
            monkeypatch,
            "train",
            "--dense.path",
            tiny_checkpoint,
            "--run",
            run,
            *TRAIN,
            "--optimizer.learning_rate",
            "1e30",
        )
    assert stopped.value.code == 5
    assert "loss is not finite" in capsys.readouterr().err
    assert not (run / "student").exists()


PRETRAIN = [
    *SMALL_TEXT, "--vocab_size", "320", "--tokenizer_documents", "20", "--n_layer", "1", "--n_embd", "16",
    "--n_head", "2", "--max_tokens", "20000", "--max_steps", "4", "--per_device_train_batch_size", "4",
    "--save_steps", "2", "--eval_blocks", "8",
]  # fmt: skip


def test_pretraining_gives_a_checkpoint_that_train_can_start_from(tmp_path, monkeypatch, capsys) -> None:
    run_in_process(monkeypatch, "pretrain", *PRETRAIN, "--output_dir", tmp_path / "p")
    folder = tmp_path / "p" / "dense"
    assert "nats/token" in (folder / "README.md").read_text()
    dense = DenseModel.from_pretrained(folder)
    assert len(dense.tokenizer) == 320
    assert dense.config.model_type == "gpt2"
    with pytest.raises(SystemExit) as stopped:
        run_in_process(monkeypatch, "pretrain", *PRETRAIN, "--output_dir", tmp_path / "q", "--n_head", "3")
    assert stopped.value.code == 2
    assert "n_embd 16 is not a multiple of n_head 3" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


# --- processes ---------------------------------------------------------------------------------------------


def assert_equal_but_for_rounding(one: Path, two: Path) -> None:
    for row, other in zip(metrics_of(one), metrics_of(two), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    weights, others = (load_file(run / "student" / "model.safetensors") for run in (one, two))
    for name, value in weights.items():
        same = (value != 0) == (others[name] != 0)
        assert same.float().mean() > 0.99, name  # near-ties may fall either way
        torch.testing.assert_close(value[same], others[name][same], atol=1e-4, rtol=1e-3)


def test_two_processes_equal_one(trained: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Half the batch on each of two gloo processes, launched as a user does: the same losses and weights."""
    two = tmp_path / "two"
    half = ["--dense.path", tiny_checkpoint, *TRAIN, "--per_device_train_batch_size", "2"]
    process = start_two("train", *half, "--run", two)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    assert_equal_but_for_rounding(trained, two)


@pytest.mark.parametrize(
    ("placement", "score"), [("shard", "magnitude"), ("replicate", "input"), ("shard", "curvature")]
)
def test_two_processes_equal_one_however_they_share(
    placement: str, score: str, tiny_checkpoint, tmp_path, monkeypatch, forks
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    shared = ["--dense.path", tiny_checkpoint, *TRAIN, "--sparsity.score", score]
    run_in_process(monkeypatch, "train", *shared, "--run", one)
    half = ["--run", two, "--per_device_train_batch_size", "2", "--dense.placement", placement]
    assert forks.run("recipes.train", [*shared, *half], processes=2) == 0
    assert_equal_but_for_rounding(one, two)


def test_a_killed_run_resumes_to_the_same_bits(trained, tiny_checkpoint, tmp_path, monkeypatch) -> None:
    run = tmp_path / "killed"
    arguments = ["--dense.path", tiny_checkpoint, "--run", run, *TRAIN]
    process = start(sys.executable, "recipes/train.py", *arguments)
    deadline = time.monotonic() + 240
    while not list((run / "checkpoints").glob("checkpoint-[24]")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run / "student").exists()
    run_in_process(monkeypatch, "train", *arguments)
    assert metrics_of(run) == metrics_of(trained)
    for name in ("student/model.safetensors", "bridges/bridges.safetensors"):
        expected, resumed = load_file(trained / name), load_file(run / name)
        assert all(torch.equal(expected[key], resumed[key]) for key in expected), name


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path / "bert"


@pytest.mark.parametrize(
    ("verb", "arguments", "code", "message"),
    [
        ("train", ["--dense.path", "/nowhere/model"], 3, "no config.json in '/nowhere/model'"),
        ("train", ["--dense.path", "BERT"], 3, "'bert' is not supported; supported: "),
        ("train", ["--dense", "BERT"], 3, "'bert' is not supported; supported: "),
        ("train", ["--dense.quantization", "2bit"], 2, "dense.quantization: got '2bit'"),
        ("train", ["--dense.pth", "x"], 2, "did you mean 'dense.path'"),
        ("train", ["--sparsity.densty", "0.1"], 2, "did you mean 'sparsity.density'"),
        ("train", ["--sparsity.density", "0"], 2, "sparsity.density: got 0"),
        ("train", ["--sparsity.density", "1.5"], 2, "sparsity.density: got 1.5"),
        ("extract", ["--tasks", "[zip_range]"], 3, "' zip' is not one token"),
        ("extract", ["--tasks", "[with_is]"], 2, "did you mean 'with_as'"),
        ("extract", ["--run", "/nowhere/run"], 3, "no student in '/nowhere/run/student'"),
        ("edit", ["--run", "/nowhere/run"], 3, "no circuits in"),
        ("audit", ["--run", "/nowhere/run"], 3, "no evaluation at"),
    ],
)
def test_bad_input_is_one_line_a_code_and_nothing_written(
    verb, arguments, code, message, bert, trained, tmp_path, monkeypatch, capsys
) -> None:
    run = tmp_path / "run"
    arguments = [str(bert) if word == "BERT" else word for word in arguments]
    if verb == "train":
        arguments = ["--run", run, *arguments]
    elif "--run" not in arguments:
        arguments = ["--run", trained, *arguments]
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        run_in_process(monkeypatch, verb, *arguments)
    assert stopped.value.code == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert not run.exists()
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_exit_code_and_last_word_of_a_recipes_own_process(tmp_path: Path) -> None:
    process = start(
        sys.executable, "recipes/train.py", "--dense.path", tmp_path / "none", "--run", tmp_path / "r"
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3
    assert errors.strip().splitlines()[-1].startswith("error: dense checkpoint: no config.json")
    assert "Traceback" not in errors


# --- configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "python").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_parses_and_names_its_command(path: Path, monkeypatch, capsys) -> None:
    verbs = dict.fromkeys(("circuits", "dense_circuits", "nonsense", "peers"), "extract") | {"edits": "edit"}
    verbs |= {"train_base": "train", "train_sparser": "train", "train_embeddings": "train"}
    verb = verbs.get(path.stem, path.stem)
    command = path.read_text().splitlines()[0]
    assert command == f"# accelerate launch recipes/{verb}.py --config recipes/python/{path.name}"
    run_in_process(monkeypatch, verb, "--config", path, "--print_config")
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["seed"] == yaml.safe_load(path.read_text()).get("seed", 0)
