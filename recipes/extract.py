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
from extractor.faithfulness import evaluate_circuit
from extractor.machine import fast_fp32, start_processes, use_all_cores
from extractor.masks import Means, mean_activations
from extractor.prune import PruneConfig, extract_circuit
from extractor.student import Student, load_student
from extractor.tasks import Pair, encode_pairs, make_pairs, refuse_unknown_tasks, task_label


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
    """Names from the list in the README, or paths of `.jsonl` files with tasks of your own."""
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
    fast_fp32()
    state = start_processes()
    refuse_unknown_tasks(config.tasks)
    student, tokenizer = load_student(config.run / "student", state.device)
    student_sha256 = fingerprint(config.run / "student")
    pairs = {task: prompts_of(task, tokenizer, student, config) for task in config.tasks}
    text = load_blocks(
        config.data, tokenizer, "train", max_tokens=config.mean_blocks * config.data.context_length
    )
    means = mean_activations(student, text.first(config.mean_blocks))
    mine = config.tasks[state.process_index :: state.num_processes]
    for task in (bar := tqdm(mine, desc="extract", disable=not state.is_main_process)):
        started = time.monotonic()
        circuit = find_circuit(student, tokenizer, task, pairs[task], means, config, student_sha256)
        task = circuit.task
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
        tasks = [task_label(task) for task in config.tasks]
        exports = [folder / task for task in tasks if config.export]
        update_manifest(
            config.run,
            "extract",
            inputs={"student": {"sha256": student_sha256}, "train_text_sha256": text.digest},
            outputs=[folder / f"{task}.json" for task in tasks] + exports,
            config=config.model_dump(mode="json"),
        )


def prompts_of(task: str, tokenizer, student: Student, config: ExtractConfig) -> dict[str, list[Pair]]:
    """Prompts to learn masks on, to choose sizes on, and held-out ones; no template or content in two."""
    counts = {
        "train": config.prune.train_pairs,
        "selection": config.prune.selection_pairs,
        "held_out": config.held_out_pairs,
    }
    limit = student.config.max_position_embeddings
    return {
        split: make_pairs(task, tokenizer, split=split, count=count, seed=config.seed, max_tokens=limit)
        for split, count in counts.items()
    }


def find_circuit(
    student: Student,
    tokenizer,
    task: str,
    pairs: dict[str, list[Pair]],
    means: Means,
    config: ExtractConfig,
    student_sha256: str,
) -> Circuit:
    """Extract one circuit and add its held-out evidence."""
    prompts = {split: encode_pairs(own, tokenizer).to(student.device) for split, own in pairs.items()}
    circuit = extract_circuit(
        student,
        task_label(task),
        prompts["train"],
        prompts["selection"],
        means,
        config.prune,
        student_sha256,
    )
    evidence = evaluate_circuit(
        student,
        circuit,
        prompts["held_out"],
        means,
        num_random=config.random_circuits,
        seed=config.seed,
    )
    example = pairs["held_out"][0]
    evidence["example"] = {
        key: getattr(example, key) for key in ("clean", "corrupted", "answer", "distractor")
    }
    return dataclasses.replace(circuit, evidence=evidence, settings=circuit.settings | {"prompts": task})


if __name__ == "__main__":
    run_recipe(main, ExtractConfig, None)
