"""The training engine: the same run on any processes, after any kill, and an end that says why."""

import json
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from extractor.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from extractor.errors import DivergedError, MachineError
from extractor.training import (
    MetricsFile,
    OptimizerConfig,
    Watch,
    WatchConfig,
    control_gradients_,
    learning_rate,
)
from tests.conftest import ROOT
from tests.recipes.forks import Forks
from tests.recipes.test_recipes import TRAIN, metrics_of, run_in_process

# --- processes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workers(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same twenty steps, 8 blocks each: on one process, in four micro-batches, on two, and sharded."""
    folder = tmp_path_factory.mktemp("workers")
    runs = {  # processes, mode, batch, micro-batches
        "one": (1, "ddp", 8, 1),
        "accumulated": (1, "ddp", 2, 4),
        "ddp": (2, "ddp", 4, 1),
        "ddp accumulated": (2, "ddp", 1, 4),
        "fsdp": (2, "fsdp", 4, 1),
        "dense sharded": (2, "shard", 4, 1),
        "nan": (2, "nan", 4, 1),
    }
    for name, (processes, *arguments) in runs.items():
        assert forks.run("tests.recipes.worker", [*arguments, folder / name], processes=processes) == 0
    for name in ("ddp", "fsdp"):  # stopped half way, then started again
        for last in (10, 20):
            arguments = [*runs[name][1:], folder / f"{name} resumed", last]
            assert forks.run("tests.recipes.worker", arguments, processes=2) == 0
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["accumulated", "ddp", "ddp accumulated", "fsdp", "dense sharded"])
def test_gradients_losses_and_weights_equal_one_process(name: str, workers: dict[str, Path]) -> None:
    one, other = workers["one"], workers[name]
    gradients, others = (load_file(run / "gradients.safetensors") for run in (one, other))
    assert gradients.keys() == others.keys()
    for key, gradient in gradients.items():
        assert (gradient - others[key]).abs().max() <= 1e-6, key
    expected = torch.tensor(json.loads((one / "record-0.json").read_text())["losses"])
    records = sorted(other.glob("record-*.json"))
    assert len(records) == (1 if name == "accumulated" else 2)
    for record in map(json.loads, (path.read_text() for path in records)):
        torch.testing.assert_close(torch.tensor(record["losses"]), expected, atol=1e-5, rtol=1e-5)
        assert len(record["exact"]) == 20
        assert all(record["exact"])  # every matrix at exactly k after every step, on every process
        assert record["whole"]
    weights, other_weights = (load_file(run / "weights.safetensors") for run in (one, other))
    for key, weight in weights.items():
        assert (weight - other_weights[key]).abs().max() < 1e-3, key


def test_row_34_a_loss_that_is_no_number_on_one_process_skips_the_step_on_all(
    workers: dict[str, Path],
) -> None:
    records = [json.loads(path.read_text()) for path in sorted(workers["nan"].glob("record-*.json"))]
    assert len(records) == 2
    for record in records:
        assert record["taken"] == [step != 3 for step in range(20)]
    weights = load_file(workers["nan"] / "weights.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_resume_to_the_same_bits(name: str, workers: dict[str, Path]) -> None:
    for file in ("weights.safetensors", "checkpoints/checkpoint-20/optimizer.safetensors"):
        straight, resumed = (load_file(workers[run] / file) for run in (name, f"{name} resumed"))
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(value, resumed[key]) for key, value in straight.items())


def test_a_checkpoint_does_not_know_how_many_processes_wrote_it(workers: dict[str, Path]) -> None:
    for name in ("one", "fsdp"):
        checkpoint = newest_checkpoint(workers[name] / "checkpoints")
        weights = load_file(workers[name] / "weights.safetensors")
        saved = load_file(checkpoint / "model.safetensors")
        assert all(torch.equal(saved[key], weight) for key, weight in weights.items())
    one, fsdp = (
        load_file(workers[n] / "checkpoints/checkpoint-20/optimizer.safetensors") for n in ("one", "fsdp")
    )
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in fsdp.items()}


# --- kills and stops -------------------------------------------------------------------------------------

LONG = ["--max_steps", "30", "--save_steps", "3", "--logging_steps", "1", "--num_mixtures", "2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source files that nobody edits meanwhile."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted((ROOT / "extractor").glob("*.py"))[:12]:
        (folder / path.name).write_text(path.read_text())
    return folder


@pytest.fixture(scope="module")
def arguments(tiny_checkpoint: Path, text: Path) -> list[str]:
    return ["--dense.path", str(tiny_checkpoint), *TRAIN, *LONG, "--data.source", str(text)]


@pytest.fixture(scope="module")
def uninterrupted(forks: Forks, arguments, tmp_path_factory) -> tuple[Path, float]:
    run = tmp_path_factory.mktemp("engine") / "whole"
    forks.run(
        "recipes.train", [*arguments, "--run", tmp_path_factory.mktemp("warm") / "run"]
    )  # fills the token cache
    started = time.monotonic()
    assert forks.run("recipes.train", [*arguments, "--run", run]) == 0
    return run, time.monotonic() - started


def assert_same_run(run: Path, expected: Path) -> None:
    assert metrics_of(run) == metrics_of(expected)
    for name in ("student/model.safetensors", "bridges/bridges.safetensors"):
        first, second = load_file(expected / name), load_file(run / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name


@pytest.mark.parametrize("score", ["input", "curvature"])
def test_a_run_that_selects_by_more_than_size_resumes_to_the_same_bits(
    score: str, forks: Forks, arguments, uninterrupted, tmp_path
) -> None:
    whole, stopped, by_size = tmp_path / "whole", tmp_path / "stopped", uninterrupted[0]
    scored = [*arguments, "--sparsity.score", score]
    assert forks.run("recipes.train", [*scored, "--run", whole]) == 0

    def at_a_checkpoint() -> None:
        while not list((stopped / "checkpoints").glob("checkpoint-*")):
            time.sleep(0.005)

    assert forks.run("recipes.train", [*scored, "--run", stopped], stop=at_a_checkpoint) == signal.SIGKILL
    assert forks.run("recipes.train", [*scored, "--run", stopped]) == 0
    assert_same_run(stopped, whole)
    assert metrics_of(whole) != metrics_of(by_size)


@pytest.mark.parametrize("times", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(
    times: int, forks: Forks, arguments, uninterrupted, tmp_path
) -> None:
    expected, seconds = uninterrupted
    moments = random.Random(0)
    run = tmp_path / "killed"
    kills, finished = 0, 0
    while kills < times:
        moment = moments.uniform(0.05, 0.95) * seconds
        status = forks.run("recipes.train", [*arguments, "--run", run], stop=lambda: time.sleep(moment))  # noqa: B023
        if status == signal.SIGKILL:
            kills += 1
            torn = list((run / "checkpoints").glob("checkpoint-*")) if run.exists() else []
            assert all((path / "state.json").is_file() for path in torn)
        else:  # it had ended before: compare, and begin another
            assert status == 0
            assert_same_run(run, expected)
            run, finished = tmp_path / f"killed-{kills}", finished + 1
    assert forks.run("recipes.train", [*arguments, "--run", run]) == 0
    assert_same_run(run, expected)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_signal_leaves_a_checkpoint_of_the_last_step(
    number: int, code: int, forks: Forks, arguments, uninterrupted, tmp_path
) -> None:
    expected, _ = uninterrupted
    run = tmp_path / "stopped"
    rarely = [*arguments, "--run", run, "--save_steps", "1000"]
    status = forks.run("recipes.train", rarely, stop=lambda: wait_for_metrics(run, 5), by=number)
    assert status >> 8 == code, status
    checkpoints = list((run / "checkpoints").glob("checkpoint-*"))
    assert len(checkpoints) == 1
    assert f"checkpoint-{metrics_of(run)[-1]['step']}" == checkpoints[0].name
    assert len(metrics_of(run)) < 30
    assert forks.run("recipes.train", rarely) == 0
    assert_same_run(run, expected)


def wait_for_metrics(run: Path, lines: int) -> None:
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_text().split()) < lines:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_other_weights_or_another_number_of_processes_do_not_resume(
    arguments, tiny_checkpoint, uninterrupted, monkeypatch, capsys
) -> None:
    run, _ = uninterrupted
    text = (run / "config.yaml").read_text()
    for line, other in (("# processes 1", "# processes 2"), ("# dense sha256 ", "# dense sha256 0")):
        (run / "config.yaml").write_text(text.replace(line, other))
        with pytest.raises(SystemExit) as stopped:
            run_in_process(monkeypatch, "train", *arguments, "--run", run)
        assert stopped.value.code == 3
        assert "holds a run with another config" in capsys.readouterr().err
    (run / "config.yaml").write_text(text)


# --- files -----------------------------------------------------------------------------------------------


def small_model() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    model, optimizer = small_model()
    save_checkpoint(tmp_path, model, optimizer, 1)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    model.weight.data += 1
    save_checkpoint(tmp_path, model, optimizer, 2)
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    assert load_checkpoint(tmp_path, model, optimizer) == 1
    assert torch.equal(model.weight, first["weight"])


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    model, optimizer = small_model()
    save_checkpoint(tmp_path, model, optimizer, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(MachineError, match="checkpoint 2 cannot be written .* earlier ones are whole"):
            save_checkpoint(tmp_path, model, optimizer, 2, attempts=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest_checkpoint(tmp_path).name == "checkpoint-1"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_run_folder_that_cannot_be_written_ends_in_one_line(
    arguments, tmp_path, monkeypatch, capsys
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        run_in_process(monkeypatch, "train", *arguments, "--run", tmp_path / "file" / "run")
    assert stopped.value.code == 4
    assert "cannot be written" in capsys.readouterr().err


def test_metrics_lose_no_line_and_double_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')  # torn by a kill
    metrics = MetricsFile(path, 2, is_writer=True)
    metrics.write({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


# --- rate, gradients, divergence -------------------------------------------------------------------------


def test_sharkfin_is_the_papers_rate() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, lr_schedule="constant", sharkfin=True)
    assert learning_rate(0, 100, config, density=1.0, target=1 / 64) == pytest.approx(1 / 8)
    assert learning_rate(50, 100, config, density=1 / 64, target=1 / 64) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_rate_schedules(schedule: str, middle: float, end: float) -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, lr_schedule=schedule, end_factor=0.1)
    rates = [learning_rate(step, 100, config, 1, 1) for step in (0, 50, 100)]
    assert rates == pytest.approx([0.1, middle, end])


@pytest.mark.parametrize(
    ("control", "rms_after"),
    [("none", 3.0), ("clip_rms", 1.0), ("normalise_rms", 1.0), ("clip_norm", 0.5 / 4)],
)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_gradient_control(control: str, rms_after: float, scale: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(16))
    parameter.grad = torch.full((16,), 3.0 * scale)
    config = OptimizerConfig(gradient_control=control, max_grad_norm=0.5)
    norm = control_gradients_(Accelerator(cpu=True), [parameter], config)
    assert norm.item() == pytest.approx(12 * scale)
    expected = rms_after if scale == 1 or control == "normalise_rms" else 3.0 * scale
    assert parameter.grad.square().mean().sqrt().item() == pytest.approx(expected, rel=0.02)


def watched_model(tmp_path: Path, max_skipped: int) -> tuple[Watch, torch.nn.Parameter, torch.optim.AdamW]:
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    return Watch(tmp_path, WatchConfig(max_skipped=max_skipped), is_writer=True), parameter, optimizer


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, tmp_path: Path) -> None:
    watch, parameter, optimizer = watched_model(tmp_path, max_skipped=2)
    watch.step(optimizer, torch.tensor(1.0))
    weights = parameter.detach().clone()
    state = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    parameter.grad.fill_(bad)
    watch.step(optimizer, torch.tensor(bad))
    assert torch.equal(parameter, weights)
    assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in state.items())
    parameter.grad.fill_(1.0)
    watch.step(optimizer, torch.tensor(1.0))
    assert not torch.equal(parameter, weights)
    assert optimizer.state[parameter]["step"] == 2  # its bias correction counts the steps taken


def test_too_many_skipped_steps_in_a_row_end_the_run_at_the_next_look(tmp_path: Path) -> None:
    watch, _, optimizer = watched_model(tmp_path, max_skipped=2)
    losses = {"ce": torch.tensor(float("nan"))}
    bad, good = torch.tensor(float("nan")), torch.tensor(1.0)
    for norm in (bad, bad, good, bad):  # back again: counted anew
        watch.step(optimizer, norm)
    assert watch.check_skipped(4, bad, losses) == 1
    for norm in (bad, bad, good):  # three in a row, over before the host looks
        watch.step(optimizer, norm)
    with pytest.raises(DivergedError, match="step 7: loss is not finite .* 3 steps in a row"):
        watch.check_skipped(7, good, losses)
    assert json.loads((tmp_path / "diverged.json").read_text())["values"] == {"ce": "nan"}


def test_an_optimizer_that_cannot_leave_a_step_out_is_refused(tmp_path: Path) -> None:
    watch, parameter, _ = watched_model(tmp_path, max_skipped=2)
    with pytest.raises(ValueError, match="fused=True"):
        watch.step(torch.optim.AdamW([parameter]), torch.tensor(1.0))


def test_a_text_loss_far_above_its_median_is_divergence(tmp_path: Path) -> None:
    watch = Watch(tmp_path, WatchConfig(max_skipped=2), is_writer=True)
    for step in range(10):
        watch.check(step, {"ce": 2.0, "total": 2.0})
    with pytest.raises(DivergedError, match="ce is 6.50 nats/token, its median was 2.00"):
        watch.check(11, {"ce": 6.5, "total": 2.0})
