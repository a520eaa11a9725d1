"""An edit as a PEFT adapter folder, or merged into a whole checkpoint; both need no code of ours.

    constant    a LoRA whose B has the delta as its bias (at the embedding: a row for every token): exact
    fitted      what depends on the text, as a low-rank map of what the module before the site reads
                (`bridges.low_rank`); `fitting_error` says what it misses on other prompts

Rank, scale and bias are ordinary LoRA, so `peft.helpers.rescale_adapter_scale` is the strength, and a
disabled adapter is the base.
"""

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bridges.dense import DenseModel
from bridges.live import LiveEdit
from bridges.low_rank import (
    LowRank,
    Prompts,
    Writer,
    best_ridge,
    constant,
    fit,
    fitting_error,
    record,
    writer_before,
)
from extractor.artifacts import SCHEMA_VERSION, replace_folder, write_json, write_text
from extractor.errors import InputError
from extractor.sites import Site


def export_adapter(
    live: LiveEdit,
    folder: Path,
    *,
    fit_on: Sequence[Prompts],
    held_out: Sequence[Prompts],
    rank: int = 16,
) -> dict[str, Any]:
    """Write the edit as an adapter that `PeftModel.from_pretrained(base, folder)` loads.

    Returns:
        `kind` ("constant" or "fitted"), `sites` with module and rank, `fitting_error` on held-out prompts,
        and the limits that were `forced`.

    Raises:
        InputError: a site that no module writes to as it is, or an edit that one adapter cannot hold.
    """
    dense, edit = live.dense, live.edit
    writers = {site: writer_before(dense, site) for site in edit.sites}
    has_embedding = any(writer.is_embedding for writer in writers.values())
    if edit.is_constant:
        if has_embedding and len(writers) > 1:
            raise InputError(
                "PEFT has no bias beside an embedding: make one adapter for 0.resid_pre, one for the rest"
            )
        with torch.no_grad(), live.applied() as model:
            model(held_out[0].ids, use_cache=False)
        parts = {site: constant(writers[site], delta[0, 0]) for site, delta in live.deltas.items()}
    else:
        # a bias that the base module has not could not be merged
        with_bias = not has_embedding and all(writer.has_bias for writer in writers.values())
        options = {"rank": rank, "bias": with_bias}
        ridges = best_ridge(live, writers, fit_on, **options)
        rows = record(live, writers, fit_on)
        parts = {
            site: fit(writer, *rows[site], ridge=ridges[site], **options) for site, writer in writers.items()
        }
    facts = {
        "kind": "constant" if edit.is_constant else "fitted",
        "sites": {
            str(site): {"module": writers[site].name, "rank": len(part.a)} for site, part in parts.items()
        },
        "fitting_error": fitting_error(parts, record(live, writers, held_out)),
        "forced": list(edit.refusals),
    }
    replace_folder(folder, lambda target: _write_adapter(target, live, writers, parts, facts))
    return facts


def _write_adapter(
    folder: Path,
    live: LiveEdit,
    writers: dict[Site, Writer],
    parts: dict[Site, LowRank],
    facts: dict[str, Any],
) -> None:
    from peft import LoraConfig  # slow to import

    dense, tensors = live.dense, {}
    for site, part in parts.items():
        key = f"base_model.model.{writers[site].name}"
        if writers[site].is_embedding:
            tensors |= {f"{key}.lora_embedding_A": part.a, f"{key}.lora_embedding_B": part.b}
            continue
        tensors |= {f"{key}.lora_A.weight": part.a, f"{key}.lora_B.weight": part.b}
        if part.bias is not None:
            tensors[f"{key}.lora_B.bias"] = part.bias
    ranks = {writers[site].name: len(part.a) for site, part in parts.items()}
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_path(dense),
        revision=dense.facts.get("commit"),
        inference_mode=True,
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,  # a scale of 1
        lora_dropout=0.0,
        target_modules=sorted(ranks),
        lora_bias=any(part.bias is not None for part in parts.values()),
        fan_in_fan_out=any(isinstance(writer.module, Conv1D) for writer in writers.values()),
    ).save_pretrained(folder)
    metadata = {"format": "pt", "base_sha256": dense.sha256}
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors", metadata=metadata)
    provenance = {**vars(live.edit.hashes), "intervention": live.edit.intervention.as_json()}
    write_json(folder / "edit.json", {"schema_version": SCHEMA_VERSION, **provenance, **facts})
    write_text(folder / "README.md", _card(dense, facts))


def _card(dense: DenseModel, facts: dict[str, Any]) -> str:
    return (
        f"---\nbase_model: {base_path(dense)}\nlibrary_name: peft\ntags: [sparsebridge, edit]\n---\n\n"
        f"# Edit of {dense.name} as an adapter ({facts['kind']})\n\n"
        "    from peft import PeftModel\n"
        "    model = PeftModel.from_pretrained(base, folder)\n\n"
        "`peft.helpers.rescale_adapter_scale(model, s)` sets its strength. Only for base weights with "
        f"SHA-256 `{dense.sha256}`. `edit.json` says what it changes, and how near a fitted one comes to the "
        "live edit.\n"
    )


def base_path(dense: DenseModel) -> str:
    """Where the base is loaded from without us.

    Raises:
        InputError: the dense model is not the checkpoint as it lies there.
    """
    facts = dense.facts
    if not facts.get("path") or facts.get("adapter") or facts.get("random_weights"):
        raise InputError(
            "an adapter belongs to a checkpoint as it is stored, not to a model in memory, with random "
            "weights or under another adapter; save that model as a checkpoint first"
        )
    path = Path(str(facts["path"])).expanduser()
    return str(path.resolve() if path.is_dir() else facts["path"])


def export_merged(live: LiveEdit, adapter: Path, folder: Path) -> None:
    """Merge an adapter of `export_adapter` into its base and save a whole checkpoint with its tokenizer.

    A tied output head keeps its weights; a module without bias gets one where the family's config has one.

    Raises:
        InputError: a constant edit of a module that can have no bias.
    """
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM

    config = LoraConfig.from_pretrained(adapter)
    load = {"dtype": torch.float32, "revision": live.dense.facts.get("commit")}
    base = AutoModelForCausalLM.from_pretrained(base_path(live.dense), local_files_only=True, **load)
    targets = [base.get_submodule(name) for name in sorted(config.target_modules)]
    if any(module is base.get_input_embeddings() for module in targets):
        _untie(base)
    if config.lora_bias and any(module.bias is None for module in targets):
        base = _with_biases(base, config.target_modules)
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)

    def write(target: Path) -> None:
        merged.save_pretrained(target)
        if live.dense.tokenizer is not None:
            live.dense.tokenizer.save_pretrained(target)
        shutil.copy(adapter / "edit.json", target / "edit.json")

    replace_folder(folder, write)


def _untie(model: PreTrainedModel) -> None:
    """Give the output head weights of its own, so that an edit of the embedding leaves it as it is."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def _with_biases(model: PreTrainedModel, targets: Collection[str]) -> PreTrainedModel:
    """The same function with zero biases, by the config's own switches."""
    config = type(model.config).from_dict(model.config.to_dict())
    for switch in ("attention_bias", "mlp_bias"):
        if hasattr(config, switch) and any(("mlp" in name) == (switch == "mlp_bias") for name in targets):
            setattr(config, switch, True)
    wider = type(model)(config).to(torch.float32).eval()
    left = wider.load_state_dict(model.state_dict(), strict=False)
    if left.unexpected_keys or not all(name.endswith(".bias") for name in left.missing_keys):
        raise InputError(f"'{config.model_type}' cannot be given biases; keep the adapter beside its base")
    with torch.no_grad():
        for name in left.missing_keys:
            wider.get_parameter(name).zero_()
    without = [name for name in targets if wider.get_submodule(name).bias is None]
    if without:
        raise InputError(
            f"'{config.model_type}' has no bias at {without[0]}, so a constant edit there cannot be merged; "
            "keep the adapter beside its base"
        )
    return wider
