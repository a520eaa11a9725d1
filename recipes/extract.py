"""Student -> task circuits, with sufficiency, necessity and random controls on held-out prompts.

    accelerate launch recipes/extract.py --config recipes/python/extract.yaml --tasks "[with_as, if_equals]"

Reads student/ of a run folder, writes circuits/<task>.json. With several processes the tasks are shared out.
"""

import dataclasses
import time
from pathlib import Path

from pydantic import Field
from tqdm.auto import tqdm

from extractor.artifacts import fingerprint, update_manifest
from extractor.circuit import Circuit
from extractor.config import Config, run_recipe
from extractor.data import DataConfig, load_blocks
from extractor.errors import InputError
from extractor.faithfulness import evaluate_circuit
from extractor.machine import start_processes, use_all_cores
from extractor.masks import Means, mean_activations
from extractor.prune import PruneConfig, extract_circuit
from extractor.student import Student, load_student
from extractor.tasks import Pair, encode_pairs, make_pairs, refuse_unknown_tasks


class ExtractConfig(Config):
    run: Path = Path("runs/python")
    """The run folder of recipes/train.py."""
    tasks: tuple[str, ...] = (
        "single_double_quote",
        "bracket_paren",
        "if_equals",
        "with_as",
        "else_elif",
        "if_return",
        "while_return_true",
    )
    """Names from the list in the README."""
    data: DataConfig = DataConfig()
    mean_blocks: int = Field(128, ge=1)
    """Training blocks over which nodes' means are taken."""
    prune: PruneConfig = PruneConfig()
    held_out_pairs: int = Field(64, ge=2)
    random_circuits: int = Field(5, ge=0)
    """Random circuits of the same size at every address, as a control."""
    export: bool = False
    """Also write each circuit as a small dense model of its own: circuits/<task>/."""
    seed: int = 0


def main(config: ExtractConfig) -> None:
    use_all_cores()
    state = start_processes()
    refuse_unknown_tasks(config.tasks)
    student, tokenizer = load_student(config.run / "student", state.device)
    student_sha256 = fingerprint(config.run / "student")
    pairs = {task: prompts_of(task, tokenizer, config) for task in config.tasks}
    text = load_blocks(
        config.data, tokenizer, "train", max_tokens=config.mean_blocks * config.data.context_length
    )
    means = mean_activations(student, text.first(config.mean_blocks))
    mine = config.tasks[state.process_index :: state.num_processes]
    for task in (bar := tqdm(mine, desc="extract", disable=not state.is_main_process)):
        started = time.monotonic()
        circuit = find_circuit(student, tokenizer, task, pairs[task], means, config, student_sha256)
        circuit.save(config.run / "circuits" / f"{task}.json")
        if config.export:
            folder = config.run / "circuits" / task
            difference = circuit.export(folder, student, means, text.first(8).to(student.device))
            bar.write(f"{task}: '{folder}', at most {difference:.1e} in a logit from the masked student")
        found = circuit.evidence
        bar.write(
            f"{task}: {found['nodes']} nodes, {found['edges']} edges, held-out loss "
            f"{found['loss']:.3f}, accuracy {found['accuracy']:.0%}, without the circuit "
            f"{found['accuracy_without']:.0%} ({time.monotonic() - started:.0f} s)"
        )
    state.wait_for_everyone()
    if state.is_main_process:
        folder = config.run / "circuits"
        exports = [folder / task for task in config.tasks if config.export]
        update_manifest(
            config.run,
            "extract",
            inputs={"student": {"sha256": student_sha256}, "train_text_sha256": text.digest},
            outputs=[folder / f"{task}.json" for task in config.tasks] + exports,
            config=config.model_dump(mode="json"),
        )


def prompts_of(task: str, tokenizer, config: ExtractConfig) -> tuple[list[Pair], list[Pair]]:
    """Training pairs (mask, then selection) and held-out pairs of a task."""
    count = config.prune.train_pairs + config.prune.selection_pairs
    train = make_pairs(task, tokenizer, split="train", count=count, seed=config.seed)
    held_out = make_pairs(task, tokenizer, split="held_out", count=config.held_out_pairs, seed=config.seed)
    shared = {pair.clean for pair in train} & {pair.clean for pair in held_out}
    if shared:
        raise InputError(f"task '{task}': {len(shared)} held-out prompts are also training prompts")
    return train, held_out


def find_circuit(
    student: Student,
    tokenizer,
    task: str,
    pairs: tuple[list[Pair], list[Pair]],
    means: Means,
    config: ExtractConfig,
    student_sha256: str,
) -> Circuit:
    """Extract one circuit and add its held-out evidence."""
    train, held_out = pairs
    split = config.prune.train_pairs
    circuit = extract_circuit(
        student,
        task,
        encode_pairs(train[:split], tokenizer).to(student.device),
        encode_pairs(train[split:], tokenizer).to(student.device),
        means,
        config.prune,
        student_sha256,
    )
    evidence = evaluate_circuit(
        student,
        circuit,
        encode_pairs(held_out, tokenizer).to(student.device),
        means,
        num_random=config.random_circuits,
        seed=config.seed,
    )
    evidence["example"] = {
        key: getattr(held_out[0], key) for key in ("clean", "corrupted", "answer", "distractor")
    }
    return dataclasses.replace(circuit, evidence=evidence)


if __name__ == "__main__":
    run_recipe(main, ExtractConfig, None)
