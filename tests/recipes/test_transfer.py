"""recipes/transfer.py, and what recipes/edit.py ships and compares on request, on a tiny student."""

import json
import shutil
from pathlib import Path

import pytest

from bridges.dense import DenseModel
from bridges.monitor import Monitor
from tests.recipes.test_recipes import EDIT, EXTRACT, SMALL_TEXT, TRAIN, open_every_read, run_in_process

TRANSFER = [
    *SMALL_TEXT, "--text_blocks", "8", "--shift_tokens", "16", "--train_pairs", "20",
    "--held_out_pairs", "8", "--attacked_pairs", "4", "--image.random_subspaces", "2", "--image.pairs", "4",
    "--image.other_pairs", "4", "--attack.candidates", "2", "--attack.spans", "1",
    "--attack.random_edits", "1", "--attack.span_tokens", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("transfer") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch, "train", *TRAIN, "--run", run, "--dense.path", tiny_checkpoint)
        run_in_process(patch, "extract", "--run", run, *EXTRACT)
        open_every_read(run)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def test_monitors_images_and_attacks_of_every_circuit(run: Path, tiny_checkpoint, monkeypatch) -> None:
    run_in_process(monkeypatch, "transfer", *TRANSFER, "--run", run, "--dense.path", tiny_checkpoint)
    table = (run / "transfer.md").read_text()
    dense = DenseModel.from_pretrained(str(tiny_checkpoint), plain=True)
    for task in ("with_as", "bracket_paren"):
        assert f"| `{task}` |" in table
        found = json.loads((run / "transfer" / f"{task}.json").read_text())
        monitor = Monitor.load(run / "monitors" / task, dense)
        assert [str(node) for node in monitor.nodes] == found["monitor"]["nodes"]
        assert set(found["monitor"]["prompts"]) == {"held_out", "shifted"}
        # all that the student reads spans the stream: nothing is left for a random subspace of that size
        assert "undefined" in found["image"]["random_subspaces"]
        assert set(found["attacks"]) >= {"distractor", "dilution"}
    manifest = json.loads((run / "manifest.json").read_text())["transfer"]["outputs"]
    assert {"transfer.md", "transfer/with_as.json", "monitors/with_as/monitor.json"} <= set(manifest)


def test_a_task_without_a_circuit_is_refused(run: Path, tiny_checkpoint, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run_in_process(
            monkeypatch, "transfer", "--run", run, "--dense.path", tiny_checkpoint, "--tasks", "[else_elif]"
        )
    assert ended.value.code == 3
    assert "no circuit of 'else_elif'" in capsys.readouterr().err.splitlines()[-1]
    assert not (run / "transfer").exists()


def test_an_edit_ships_as_adapter_and_is_compared(run: Path, tiny_checkpoint, monkeypatch) -> None:
    options = ["--tasks", "[with_as]", "--ship.adapter", "true", "--ship.merged", "true", "--force", "true"]
    options += ["--alternatives.enabled", "true", "--alternatives.limits", "[0.01, 0.1]"]
    options += ["--alternatives.lora.steps", "2", "--alternatives.channels_tried", "2"]
    run_in_process(monkeypatch, "edit", *EDIT, *options, "--run", run, "--dense.path", tiny_checkpoint)
    folder = run / "edits" / "with_as"
    edit = json.loads((folder / "edit.json").read_text())
    assert edit["adapter"]["base_when_disabled"] is True
    assert 0 <= edit["adapter"]["flip_rate"] <= 1
    assert edit["adapter"]["off_target_kl"] >= -1e-7  # in fp32 the KL of two equal models is rounding
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert (folder / "merged" / "model.safetensors").is_file()
    assert set(edit["alternatives"]["methods"]) >= {"edit", "difference of means", "LoRA"}
    assert len(edit["growth"][0]["flip_rate_indirect"]["1"]) == len(edit["growth"][0]["nodes"])
    assert "| `with_as` |" in (run / "edits.md").read_text()


def test_edits_of_any_channel_need_no_circuits(run: Path, tiny_checkpoint, monkeypatch, capsys) -> None:
    """A student and its bridges are enough, as they ship: tasks by name, one answer more for later sites."""
    for name in ("circuits", "circuits.md", "thresholds.json"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    options = [*EDIT, "--run", run, "--dense.path", tiny_checkpoint]
    options += ["--edit.nodes", "student", "--edit.candidates", "1", "--edit.swapped", "0"]
    for wrong, message in (
        (["--tasks", "[with_is]"], "did you mean 'with_as'"),
        (["--edit.sites", "[5.resid_mid]"], "edit.sites: no bridge at '5.resid_mid'; there are 0.resid_pre,"),
    ):
        with pytest.raises(SystemExit) as ended:
            run_in_process(monkeypatch, "edit", *options, *wrong)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    options += ["--edit.later_max_size", "5", "--tasks", "[with_as, else_elif]"]
    run_in_process(monkeypatch, "edit", *options)
    for task in ("with_as", "else_elif"):
        edit = json.loads((run / "edits" / task / "edit.json").read_text())
        assert edit["later"]["site"] != "0.resid_pre"
        assert edit["later"]["size"] == len(edit["later"]["nodes"]) <= 5
        assert {"flip_rate", "control_random_node", "num_prompts"} <= set(edit["later"])
        assert set(edit["best"]) == {"1", "2"}
        assert edit["best"]["1"]["size"] <= 4
        assert edit["prediction"]["num_points"] > 0
    assert "| `else_elif` |" in (run / "edits.md").read_text()


def test_an_adapter_that_misses_what_the_edit_adds_is_not_kept(
    run: Path, tiny_checkpoint, monkeypatch
) -> None:
    lenient = ["bridge_nmse", "bridge_kl", "off_target_kl"]
    options = [word for name in lenient for word in (f"--limits.{name}", "1e9")]
    options += ["--tasks", "[with_as]", "--ship.adapter", "true", "--ship.rank", "1"]
    folder = run / "edits" / "with_as"

    def ship(limit: str) -> dict:
        own = [*options, "--limits.adapter_missed", limit, "--run", run, "--dense.path", tiny_checkpoint]
        run_in_process(monkeypatch, "edit", *EDIT, *own)
        return json.loads((folder / "edit.json").read_text())["adapter"]

    found = ship("1e-9")
    assert "misses" in found["refused"][0]
    assert "the limit is 0%" in found["refused"][0]
    assert not (folder / "adapter").exists()
    found = ship("1e9")
    assert "refused" not in found
    assert (folder / "adapter").is_dir()
