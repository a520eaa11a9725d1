"""Student -> task circuits, with evidence on held-out prompts, controls, and a verdict for each.

    accelerate launch recipes/extract.py --config recipes/python/extract.yaml --tasks "[with_as, if_equals]"

Reads student/ of a run folder. Writes thresholds.json before anything is looked for, then
circuits/means.safetensors (what ablated nodes carry), circuits/<task>.json, circuits/<task>/ (what each node
means, graphs) and circuits.md (the table).
With several processes each takes the next task when it is free. A circuit that is there, from the same
student, prompts, settings and code, is not looked for again.
"""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from pydantic import Field
from tqdm.auto import tqdm

from bridges.checkpoint import DenseConfig, check_same_tokenizer
from bridges.dense import DenseModel
from bridges.dense_circuits import compare_circuits, comparison_table, dense_views, draw_comparison
from bridges.layouts import circuit_picture
from bridges.plots import draw
from extractor.artifacts import (
    SCHEMA_VERSION,
    combine_hashes,
    file_sha256,
    fingerprint,
    source_sha256,
    text_sha256,
    update_manifest,
    write_json,
)
from extractor.circuit import Circuit
from extractor.circuit_scores import PeersConfig, compare_peers
from extractor.circuit_table import circuit_table, put_table
from extractor.config import Config, run_recipe
from extractor.controls import (
    ControlsConfig,
    nonsense_controls,
    other_task_controls,
    seed_controls,
    shuffled_control,
)
from extractor.data import DataConfig, load_spread
from extractor.evidence import EvidenceConfig, gather_evidence
from extractor.machine import fast_fp32, shared_out, start_processes, use_all_cores
from extractor.masks import Bank, Means, mean_activations, save_means
from extractor.meaning import describe_nodes
from extractor.neuronpedia import neuronpedia_graph
from extractor.prices import node_prices
from extractor.prune import PruneConfig, Search, finish_circuit, search_masks, task_settings
from extractor.rotation import RotationConfig
from extractor.size_curve import size_curve
from extractor.student import Student, load_student
from extractor.tasks import Pair, TaskBatch, encode_pairs, make_pairs, refuse_unknown_tasks, task_label
from extractor.verdict import Thresholds, judge


class ExtractConfig(Config):
    run: Path = Path("runs/python")
    """The run folder of recipes/train.py."""
    tasks: tuple[str, ...] = (
        "single_double_quote",
        "bracket_paren",
        "if_equals",
        "with_as",
        "else_elif",
        "while_return_true",
    )
    """Names from the list in the README, or paths of `.jsonl` files with tasks of your own."""
    data: DataConfig = DataConfig()
    mean_blocks: int = Field(128, ge=1)
    """Training blocks over which nodes' means are taken."""
    prune: PruneConfig = PruneConfig()
    held_out_pairs: int = Field(64, ge=2)
    evidence: EvidenceConfig = EvidenceConfig()
    controls: ControlsConfig = ControlsConfig()
    thresholds: Thresholds = Thresholds()
    """What a circuit must reach for its verdict; fixed in the run folder before the first mask is learned."""
    peers: PeersConfig = PeersConfig()
    curve: bool = False
    """Also measure size against loss, from the masks at hand."""
    describe: bool = False
    """Also describe every node (contexts, effects, weights, labels), draw it; graphs for other tools."""
    describe_at_most: int = Field(512, ge=1)
    """Nodes; circuits of more are not described."""
    describe_blocks: int = Field(64, ge=2)
    """Held-out blocks in which nodes' contexts are looked for."""
    export: bool = False
    """Also write each circuit as a small dense model of its own: circuits/<task>/model/."""
    compare_dense: bool = False
    """Also look for the dense model's own circuits, with the same search: circuits-dense.json, .md, .svg."""
    dense: DenseConfig = DenseConfig()
    rotation: RotationConfig = RotationConfig()
    table: Path | None = None
    """A Markdown file whose lines between `<!-- circuits -->` and `<!-- /circuits -->` become the table."""
    seed: int = 0


@dataclass(frozen=True)
class TaskPrompts:
    """A task's prompts by split: to learn masks on, to choose sizes on, and held-out ones; no template or
    content is in two."""

    pairs: dict[str, list[Pair]]
    batches: dict[str, TaskBatch]


@dataclass(frozen=True)
class Subject:
    """The student, and what its ablated nodes carry."""

    student: Student
    tokenizer: object
    sha256: str
    text: torch.Tensor  # training blocks
    held_out_text: torch.Tensor
    means: Means  # over the text; what evidence is measured with
    frozen: Means  # what closed nodes carry while a circuit is looked for: the means, or zeros
    bank: Bank
    resampled: Bank | None  # the bank, where a circuit is looked for under resample ablation
    prices: torch.Tensor | None  # what nodes cost in a circuit


def main(config: ExtractConfig) -> None:
    use_all_cores()
    fast_fp32()
    state = start_processes()
    refuse_unknown_tasks(config.tasks)
    subject, text_digest = load_subject(config, state.device)
    prompts = {task_label(task): prompts_of(task, subject, config) for task in config.tasks}
    folder = config.run / "circuits"
    if state.is_main_process:
        config.thresholds.fix(config.run / "thresholds.json")
        facts = {"student_sha256": subject.sha256, "train_text_sha256": text_digest}
        save_means(folder / "means.safetensors", subject.means, facts)
    hashes = work_hashes(config, subject, text_digest, prompts)
    mine = shared_out(config.tasks, state, config.run)
    total = len(config.tasks) if state.num_processes == 1 else None
    for name in (bar := tqdm(mine, total=total, desc="extract", disable=not state.is_main_process)):
        started, task = time.monotonic(), task_label(name)
        path = folder / f"{task}.json"
        if path.exists() and Circuit.load(path).hashes == hashes[task]:
            bar.write(f"{task}: done before")
            continue
        circuit = dataclasses.replace(find_circuit(subject, name, prompts, config), hashes=hashes[task])
        write_extras(subject, circuit, prompts[task], folder / task, config)
        circuit.save(path)
        bar.write(f"{one_line(circuit)} ({time.monotonic() - started:.0f} s)")
    if state.is_main_process:
        write_summary(config, list(prompts), subject, text_digest)
    if config.compare_dense:
        compare_with_dense(config, subject, prompts, state)


def load_subject(config: ExtractConfig, device: torch.device) -> tuple[Subject, str]:
    """The run's student and its means; and the digest of the training text."""
    student, tokenizer = load_student(config.run / "student", device)
    student.requires_grad_(False)
    train = load_spread(config.data, tokenizer, "train", config.mean_blocks)
    text = train.sample(config.mean_blocks)[0].to(device)
    held_out = text[:0]
    if config.describe:
        blocks = load_spread(config.data, tokenizer, "held_out", config.describe_blocks)
        held_out = blocks.sample(config.describe_blocks)[0]
    means, bank = mean_activations(student, text), Bank(student, text)
    frozen = means
    if config.prune.ablation == "zero":
        frozen = {address: torch.zeros_like(mean) for address, mean in means.items()}
    resampled = bank if config.prune.ablation == "resample" else None
    prices = node_prices(student, text, frozen, config.prune.general_price)
    sha256 = fingerprint(config.run / "student")
    subject = Subject(student, tokenizer, sha256, text, held_out, means, frozen, bank, resampled, prices)
    return subject, train.digest


def prompts_of(task: str, subject: Subject, config: ExtractConfig) -> TaskPrompts:
    counts = {
        "train": config.prune.train_pairs,
        "selection": config.prune.selection_pairs,
        "held_out": config.held_out_pairs,
    }
    limit = subject.student.config.max_position_embeddings
    tokenizer = subject.tokenizer
    pairs = {
        split: make_pairs(task, tokenizer, split=split, count=count, seed=config.seed, max_tokens=limit)
        for split, count in counts.items()
    }
    device = subject.student.device
    batches = {split: encode_pairs(own, tokenizer).to(device) for split, own in pairs.items()}
    return TaskPrompts(pairs, batches)


def work_hashes(
    config: ExtractConfig, subject: Subject, text_digest: str, prompts: Mapping[str, TaskPrompts]
) -> dict[str, dict[str, str]]:
    """By task, what its circuit follows from: the same hashes, the same circuit."""
    settings = config.model_dump(mode="json", exclude={"run", "table", "compare_dense", "dense", "rotation"})
    pairs = {
        task: text_sha256({split: [vars(pair) for pair in some] for split, some in own.pairs.items()})
        for task, own in prompts.items()
    }
    shared = {
        "student_sha256": subject.sha256,
        "train_text_sha256": text_digest,
        "settings_sha256": text_sha256(settings),
        "other_tasks_sha256": combine_hashes(pairs),
        "code_sha256": combine_hashes({"extractor": source_sha256(), "recipe": file_sha256(Path(__file__))}),
    }
    return {task: shared | {"task_sha256": own} for task, own in pairs.items()}


def find_circuit(
    subject: Subject, name: str, prompts: Mapping[str, TaskPrompts], config: ExtractConfig
) -> Circuit:
    """One task's circuit with its evidence, its controls and the verdict that follows."""
    task, student = task_label(name), subject.student
    own = prompts[task].batches
    settings = task_settings(student, own["train"], own["selection"], config.prune)
    search = search_masks(student, settings, subject.frozen, config.prune, subject.resampled, subject.prices)
    circuit = finish_circuit(student, task, search, config.prune, subject.sha256, bank=subject.resampled)
    evidence = gather_evidence(
        student,
        circuit,
        own["selection"],
        own["held_out"],
        subject.means,
        subject.bank,
        config.evidence,
    )
    others = {other: its.batches["held_out"] for other, its in prompts.items() if other != task}
    is_found = circuit.settings["reached_loss"] is not None
    controls = run_controls(subject, circuit, search, prompts[task], others, config) if is_found else {}
    evidence["controls"] = controls
    evidence["verdict"] = judge(evidence, controls, config.thresholds).as_json()
    if config.curve and is_found:
        evidence["size_curve"] = size_curve(student, search, own["held_out"], subject.resampled)
    if config.peers.enabled and is_found:
        evidence["peers"] = compare_peers(
            student,
            own["train"],
            own["held_out"],
            subject.means,
            circuit,
            config.peers,
            target_loss=config.prune.target_loss,
            tau=search.masks.of_nodes(search.found[search.best].tau),
        )
    example = prompts[task].pairs["held_out"][0]
    evidence["example"] = {
        key: getattr(example, key) for key in ("clean", "corrupted", "answer", "distractor")
    }
    return dataclasses.replace(circuit, evidence=evidence, settings=circuit.settings | {"prompts": name})


def run_controls(
    subject: Subject,
    circuit: Circuit,
    search: Search,
    prompts: TaskPrompts,
    others: Mapping[str, TaskBatch],
    config: ExtractConfig,
) -> dict[str, object]:
    """Every control that is asked for."""
    wanted, student = config.controls, subject.student
    controls: dict[str, object] = {"seeds": seed_controls(search, circuit)}
    if wanted.nonsense:
        controls["nonsense"] = nonsense_controls(
            student,
            prompts.pairs,
            subject.tokenizer,
            subject.frozen,
            config.prune,
            wanted.nonsense,
            bank=subject.resampled,
            prices=subject.prices,
        )
    if wanted.shuffled:
        controls["shuffled"] = shuffled_control(student, prompts.batches, subject.text, config.prune)
    if wanted.other_tasks and others:
        controls["other_tasks"] = other_task_controls(student, circuit, others, subject.means)
    return controls


def write_extras(
    subject: Subject, circuit: Circuit, prompts: TaskPrompts, folder: Path, config: ExtractConfig
) -> None:
    """What is asked for beside the circuit's own file."""
    student = subject.student
    if config.export:
        ids = subject.text[:8]
        circuit.export(folder / "model", student, subject.frozen, ids)
    if config.describe and len(circuit.nodes) <= config.describe_at_most:
        nodes = describe_nodes(
            student,
            subject.tokenizer,
            circuit,
            subject.frozen,
            subject.held_out_text,
            prompts.batches["held_out"],
            config.seed,
        )
        write_json(folder / "nodes.json", {"schema_version": SCHEMA_VERSION, "nodes": nodes})
        graph = neuronpedia_graph(circuit, student, subject.tokenizer, subject.frozen)
        write_json(folder / "neuronpedia.json", graph)
        if circuit.nodes:
            (folder / "circuit.svg").write_text(circuit_picture(circuit), encoding="utf-8")


def one_line(circuit: Circuit) -> str:
    found = circuit.evidence
    return (
        f"{circuit.task}: {found['nodes']} nodes, {found['edges']} edges, held-out loss "
        f"{found['loss']:.3f}, accuracy {found['accuracy']:.0%}, without the circuit "
        f"{found['accuracy_without']:.0%}: {found['verdict']['word']}"
    )


def write_summary(config: ExtractConfig, tasks: list[str], subject: Subject, text_digest: str) -> None:
    """The table of this run's circuits, and the manifest."""
    folder = config.run / "circuits"
    table = circuit_table([Circuit.load(folder / f"{task}.json") for task in tasks])
    (config.run / "circuits.md").write_text(table, encoding="utf-8")
    if config.table is not None:
        put_table(config.table, table)
    extras = [folder / task for task in tasks if (folder / task).is_dir()]
    update_manifest(
        config.run,
        "extract",
        inputs={"student": {"sha256": subject.sha256}, "train_text_sha256": text_digest},
        outputs=[
            config.run / "thresholds.json",
            folder / "means.safetensors",
            *(folder / f"{task}.json" for task in tasks),
            *extras,
        ],
        config=config.model_dump(mode="json"),
    )


def compare_with_dense(
    config: ExtractConfig, subject: Subject, prompts: Mapping[str, TaskPrompts], state: PartialState
) -> None:
    """The same search on the dense model, in its own basis and turned, and on the student."""
    dense = DenseModel.from_pretrained(config.dense, device=subject.student.device, plain=True)
    check_same_tokenizer(subject.tokenizer, str(config.run / "student"), dense.tokenizer, dense.name)
    with state.main_process_first():  # the others find its rotation in the cache
        models = dense_views(dense, config.rotation) | {"student": subject.student}
    batches = {task: own.batches for task, own in prompts.items()}
    share = (state.process_index, state.num_processes)
    comparison = compare_circuits(models, batches, subject.text, config.prune, *share)
    if not state.is_main_process:
        return
    value = {"schema_version": SCHEMA_VERSION, "dense_sha256": dense.sha256, **comparison}
    write_json(config.run / "circuits-dense.json", value | {"student_sha256": subject.sha256})
    table = comparison_table(comparison)
    (config.run / "circuits-dense.md").write_text(table, encoding="utf-8")
    tqdm.write(table)
    draw(config.run / "circuits-dense.svg", draw_comparison, comparison)


if __name__ == "__main__":
    run_recipe(main, ExtractConfig, None)
