"""Dense model and student on the same held-out prompts of every task that the tokenizer allows."""

import torch

from bridges.run_models import RunModels
from extractor.errors import InputError
from extractor.tasks import accuracy, encode_pairs, make_pairs, task_names, two_way_loss


@torch.no_grad()
def compare_behaviour(
    models: RunModels, count: int, tasks: tuple[str, ...] = ()
) -> tuple[dict[str, dict[str, dict[str, float]]], list[dict[str, str]]]:
    """Two-way accuracy and loss (nats per prompt) by model and task; and which tasks are refused, and why."""
    tables: dict[str, dict] = {"dense": {}, "student": {}}
    exclusions = []
    limit = models.student.config.max_position_embeddings
    for task in tasks or task_names():
        try:
            pairs = make_pairs(
                task, models.tokenizer, split="held_out", count=count, seed=models.seed, max_tokens=limit
            )
        except InputError as error:
            exclusions.append({"what": f"task {task}", "why": str(error)})
            continue
        batch = encode_pairs(pairs, models.tokenizer).to(models.dense.device)
        logits = {
            "dense": models.dense.run(batch.ids, record=False).logits,
            "student": models.student(batch.ids).logits,
        }
        for name, table in tables.items():
            difference = batch.logit_difference(logits[name])
            table[task] = {
                "accuracy": accuracy(difference),
                "loss": two_way_loss(difference).item(),
                "num_prompts": len(batch),
            }
    return tables, exclusions
