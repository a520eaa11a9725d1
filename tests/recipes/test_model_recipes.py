"""The recipes for published models: every file is read by what will read it, and says what it costs."""

import re
import runpy
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from accelerate.utils.constants import FSDP2_STATE_DICT_TYPE, FSDP_AUTO_WRAP_POLICY

from bridges.coupled import CoupledModel
from bridges.plan import describe, plan
from extractor.config import Config, load_config
from extractor.tasks import refuse_unknown_tasks
from tests.conftest import ROOT
from tests.recipes.test_recipes import run_in_process

RECIPES = ROOT / "recipes"
# As transformers counts the published checkpoints, tied weights once.
PARAMETERS = {
    "gpt2": 124_439_808,
    "pythia-160m": 162_322_944,
    "qwen3-0.6b": 596_049_920,
    "smollm2-135m": 134_515_008,
}
CONFIGS = {
    "train": "TrainConfig", "extract": "ExtractConfig", "edit": "EditRecipeConfig", "audit": "AuditConfig",
    "pretrain": "PretrainConfig", "transfer": "TransferConfig", "compare": "CompareConfig",
}  # fmt: skip
OTHERS = ("accelerate", "study")  # launch settings, read below; what variants change, in test_study.py
YAMLS = sorted(path for path in RECIPES.glob("*/*.yaml") if path.parent.name not in OTHERS)


def read(path: Path) -> Config:
    """By the recipe that its first line launches."""
    verb = re.search(r"recipes/(\w+)\.py", path.read_text())[1]
    config_type = runpy.run_path(str(RECIPES / f"{verb}.py"))[CONFIGS[verb]]
    return load_config(config_type, ["--config", str(path)])


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_yaml_is_a_config_of_its_recipe(path: Path) -> None:
    config = read(path)
    refuse_unknown_tasks(getattr(config, "tasks", ()))


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_model_has_the_four_recipes_with_their_commands(name: str) -> None:
    folder = RECIPES / name
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "train.yaml", "extract.yaml", "edit.yaml", "audit.yaml",
    }  # fmt: skip
    hub_ids = set()
    for path in folder.glob("*.yaml"):
        first = path.read_text().splitlines()[0]
        launch = "accelerate launch --config_file recipes/accelerate/gpu1.yaml"
        assert first == f"# {launch} recipes/{path.stem}.py --config recipes/{name}/{path.name}"
        assert "not measured on a GPU" in path.read_text()
        config = read(path)
        assert config.run == Path("runs") / name
        if path.stem != "extract":
            hub_ids.add(config.dense.path)
    assert len(hub_ids) == 1


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_plan_takes_seconds_and_is_what_the_header_says(name: str) -> None:
    started = time.monotonic()
    config = read(RECIPES / name / "train.yaml")
    found = plan(
        RECIPES / name,
        config.student,
        sparsity=config.sparsity,
        hybrid=config.loss.hybrid_sites,
        batch_size=config.per_device_train_batch_size,
        context_length=config.data.context_length,
        num_steps=config.max_steps,
        accumulation=config.gradient_accumulation_steps,
        bf16=True,
    )
    assert time.monotonic() - started < 60  # seconds, also on a CPU that has no bf16 and other work
    assert found.dense_parameters == PARAMETERS[name]
    assert found.tokens == config.max_train_tokens
    header = (RECIPES / name / "train.yaml").read_text()
    memory = float(re.search(r"Memory: about (\d+) GiB", header).group(1))
    flops = float(re.search(r"Compute: (\S+) FLOPs", header).group(1))
    assert memory == pytest.approx(found.peak_bytes / 2**30, rel=0.05)
    assert flops == pytest.approx(found.num_steps * sum(found.flops.values()), rel=0.05)
    assert memory < 0.75 * 80e9 / 2**30  # room for what no estimate sees
    assert f"{PARAMETERS[name]:,} parameters" in describe(found)


@pytest.mark.parametrize("path", sorted((RECIPES / "python").glob("train.yaml")), ids=lambda p: p.parent.name)
def test_the_plan_of_the_shipped_checkpoint(path: Path) -> None:
    config = read(path)
    found = plan(
        ROOT / config.dense.path,
        config.student,
        sparsity=config.sparsity,
        batch_size=config.per_device_train_batch_size,
        context_length=config.data.context_length,
        num_steps=config.max_steps,
    )
    # as report.json of the quickstart says
    assert (found.student_parameters, found.student_nonzeros) == (4_271_104, 543_744)


# --- launch settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_every_launch_file_and_its_command_names_files_that_exist(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"  # the recipe chooses
    wanted = {"cpu1": 1, "cpu2": 2, "gpu1": 1, "ddp": 8, "fsdp2": 8, "multinode": 16}
    assert config.num_processes == wanted[path.stem]
    command = path.read_text().splitlines()[0]
    assert f"--config_file recipes/accelerate/{path.name} " in command
    for name in re.findall(r"recipes/\S+", command):
        assert (ROOT / name).is_file(), name


def test_fsdp_shards_the_blocks_of_the_student() -> None:
    path = RECIPES / "accelerate" / "fsdp2.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == DistributedType.FSDP
    settings = config.fsdp_config
    assert settings == yaml.safe_load(path.read_text())["fsdp_config"]
    assert settings["fsdp_version"] == 2
    assert settings["fsdp_auto_wrap_policy"] in FSDP_AUTO_WRAP_POLICY
    assert settings["fsdp_state_dict_type"] in FSDP2_STATE_DICT_TYPE
    assert settings["fsdp_transformer_layer_cls_to_wrap"] in CoupledModel._no_split_modules
    assert load_config_from_file(str(RECIPES / "accelerate" / "multinode.yaml")).num_machines == 2


@pytest.mark.parametrize(("model", "parameters"), PARAMETERS.items())
def test_the_command_in_a_header_plans_without_a_hub(
    model: str, parameters: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The hub id of the YAML is never asked for: the shipped config.json stands for it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run_in_process(monkeypatch, "train", "--config", ROOT / "recipes" / model / "train.yaml", "--dry_run")
    printed = capsys.readouterr().out
    assert f"{parameters:,} parameters" in printed
    assert "per process" in printed
    assert "dry_run: true" in printed
