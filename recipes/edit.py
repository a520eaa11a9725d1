"""Circuits and bridges -> edits of the dense model, measured beside their controls.

    accelerate launch recipes/edit.py --config recipes/python/edit.yaml

Per circuit: nodes and site are chosen on training prompts by the indirect effect, then the edit is
measured on held-out prompts. Reads student/, bridges/ and circuits/ of a run folder, writes edits/<task>/.
"""

import time
from pathlib import Path

from pydantic import Field
from tqdm.auto import tqdm

from bridges.bridge import BridgeSet
from bridges.checkpoint import DenseConfig, check_same_tokenizer
from bridges.dense import DenseModel
from bridges.edit import Edit, EditConfig, PromptStreams, choose_edit, measure_edit
from extractor.artifacts import fingerprint, read_json, update_manifest
from extractor.circuit import Circuit
from extractor.config import Config, run_recipe
from extractor.errors import InputError
from extractor.machine import fast_fp32, start_processes, use_all_cores
from extractor.student import load_student
from extractor.tasks import encode_pairs, make_pairs


class EditRecipeConfig(Config):
    run: Path = Path("runs/python")
    """The run folder of recipes/train.py and recipes/extract.py."""
    dense: DenseConfig = DenseConfig()
    tasks: tuple[str, ...] = ()
    """Which circuits; empty: all of the run."""
    edit: EditConfig = EditConfig()
    train_pairs: int = Field(32, ge=2)
    """Training pairs on which site and nodes are chosen."""
    held_out_pairs: int = Field(64, ge=2)
    seed: int = 0


def main(config: EditRecipeConfig) -> None:
    use_all_cores()
    fast_fp32()
    state = start_processes()
    circuits = load_circuits(config)
    # an edit is one of the model itself, so it is chosen and measured in full precision
    dense = DenseModel.from_pretrained(config.dense, device=state.device, plain=True)
    student, tokenizer = load_student(config.run / "student", state.device)
    check_same_tokenizer(tokenizer, str(config.run / "student"), dense.tokenizer, dense.name)
    bridges = BridgeSet.from_pretrained(config.run / "bridges").to(state.device)
    hashes = check_hashes(config, dense, circuits)
    mine = circuits[state.process_index :: state.num_processes]
    for circuit in (bar := tqdm(mine, desc="edit", disable=not state.is_main_process)):
        started = time.monotonic()

        def streams(split: str, count: int, task: str = circuit.settings["prompts"]) -> PromptStreams:
            limit = student.config.max_position_embeddings
            pairs = make_pairs(task, tokenizer, split=split, count=count, seed=config.seed, max_tokens=limit)
            batch = encode_pairs(pairs, tokenizer).to(state.device)
            return PromptStreams(dense, student, bridges, batch)

        edit = choose_edit(streams("train", config.train_pairs), circuit, bridges, config.edit)
        if edit is None:
            bar.write(f"{circuit.task}: the circuit reads no residual channel; no edit")
            continue
        held_out = streams("held_out", config.held_out_pairs)
        found = measure_edit(held_out, edit, bridges, config.edit, config.seed)
        edit.save(config.run / "edits" / circuit.task, {"task": circuit.task, **hashes, **found})
        bar.write(describe(circuit.task, edit, found, time.monotonic() - started))
    state.wait_for_everyone()
    if state.is_main_process:
        folders = [config.run / "edits" / circuit.task for circuit in circuits]
        update_manifest(
            config.run,
            "edit",
            inputs=hashes,
            outputs=[folder for folder in folders if folder.is_dir()],
            config=config.model_dump(mode="json"),
        )


def load_circuits(config: EditRecipeConfig) -> list[Circuit]:
    folder = config.run / "circuits"
    names = config.tasks or sorted(path.stem for path in folder.glob("*.json"))
    if not names:
        raise InputError(f"no circuits in '{folder}'; recipes/extract.py writes them")
    return [Circuit.load(folder / f"{name}.json") for name in names]


def check_hashes(config: EditRecipeConfig, dense: DenseModel, circuits: list[Circuit]) -> dict[str, str]:
    """The weights everything belongs to; circuits or bridges of other weights are refused."""
    student_sha256 = fingerprint(config.run / "student")
    for circuit in circuits:
        if circuit.student_sha256 != student_sha256:
            raise InputError(
                f"circuit '{circuit.task}' belongs to a student with weights "
                f"{circuit.student_sha256[:12]}, this run has {student_sha256[:12]}; extract it again"
            )
    header = read_json(config.run / "bridges" / "bridges.json", "bridges", "recipes/train.py")
    if header["dense_sha256"] != dense.sha256:
        raise InputError(
            f"the bridges in '{config.run}' were trained on a dense checkpoint with weights "
            f"{header['dense_sha256'][:12]}, '{dense.name}' has {dense.sha256[:12]}"
        )
    return {
        "dense_sha256": dense.sha256,
        "student_sha256": student_sha256,
        "bridges_sha256": fingerprint(config.run / "bridges"),
    }


def describe(task: str, edit: Edit, found: dict, seconds: float) -> str:
    best = max(range(len(found["strengths"])), key=lambda i: found["flip_rate_indirect"][i])
    return (
        f"{task}: {found['size']} nodes at {edit.site}, strength {found['strengths'][best]}: flips "
        f"{found['flip_rate'][best]:.0%}, indirect {found['flip_rate_indirect'][best]:.0%}; controls "
        f"{found['control_random_node'][best]:.0%} and {found['control_random_direction'][best]:.0%} "
        f"({seconds:.0f} s)"
    )


if __name__ == "__main__":
    run_recipe(main, EditRecipeConfig, None)
