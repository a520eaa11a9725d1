"""What others get: an exported edit, loaded in a process of its own by transformers and PEFT alone.

The process gets token ids and writes logits; it imports nothing of ours (`python -I`).
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from bridges.dense import DenseModel
from bridges.edit_adapter import base_path
from bridges.live import LiveEdit
from bridges.low_rank import Prompts
from extractor.errors import InputError

HALF = 0.5

SCRIPT = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
checkpoint, revision, adapter, merged, exact, given, written = sys.argv[1:]
ids = load_file(given)["ids"]
load = {"dtype": torch.float32, "local_files_only": True, "revision": revision or None}
model = AutoModelForCausalLM.from_pretrained(checkpoint, **load).eval()
found = {}
with torch.no_grad():
    found["plain"] = model(ids, use_cache=False).logits
    if merged:
        whole = AutoModelForCausalLM.from_pretrained(merged, **load | {"revision": None}).eval()
        found["merged"] = whole(ids, use_cache=False).logits
    from peft import PeftModel
    from peft.helpers import rescale_adapter_scale
    model = PeftModel.from_pretrained(model, adapter).eval()
    found["full"] = model(ids, use_cache=False).logits
    with rescale_adapter_scale(model, 0.5):
        found["half"] = model(ids, use_cache=False).logits
    with model.disable_adapter():
        found["off"] = model(ids, use_cache=False).logits
    if exact:
        found["float64"] = model.double()(ids, use_cache=False).logits
save_file({name: logits.contiguous() for name, logits in found.items()}, written)
"""


def compare_exports(
    live: LiveEdit, adapter: Path, prompts: Prompts, merged: Path | None = None
) -> dict[str, Any]:
    """The adapter, and the merged checkpoint, reloaded elsewhere against the live edit on these prompts.

    Returns:
        `max_logit_difference` at strength 1 and `max_logit_difference_half` at one half, beside `max_logit`;
        `base_when_disabled`: switched off, the logits are the base's, bit for bit;
        `max_logit_difference_merged` where there is a merged checkpoint; `max_logit_difference_float64` of a
        constant edit, which an adapter holds exactly: what is left of the difference without fp32's rounding.
    """
    is_exact = live.edit.is_constant
    found = _fresh_logits(live.dense, adapter, merged, prompts.ids, is_exact=is_exact)
    inside = prompts.inside.cpu()
    full, half = (_live_logits(live, prompts, strength) for strength in (1.0, HALF))

    def difference(name: str, expected: Tensor) -> float:
        return (found[name] - expected)[inside].abs().max().item()

    facts = {
        "max_logit_difference": difference("full", full),
        "max_logit_difference_half": difference("half", half),
        "max_logit": full[inside].abs().max().item(),
        "base_when_disabled": torch.equal(found["off"], found["plain"]),
        "compared_on_tokens": int(inside.sum()),
    }
    if merged is not None:
        facts["max_logit_difference_merged"] = difference("merged", full)
    if is_exact:
        with _in_float64(live.dense.model):
            facts["max_logit_difference_float64"] = difference("float64", _live_logits(live, prompts, 1.0))
    return facts


@torch.no_grad()
def _live_logits(live: LiveEdit, prompts: Prompts, strength: float) -> Tensor:
    options = {"last": prompts.last, "counterfactual": prompts.counterfactual}
    with live.applied(strength=strength, **options) as model:
        return model(prompts.ids, use_cache=False).logits.cpu()


@contextmanager
def _in_float64(model: PreTrainedModel) -> Iterator[None]:
    """The same fp32 weights, computed with in float64."""
    model.double()
    try:
        yield
    finally:
        model.float()


def _fresh_logits(
    dense: DenseModel, adapter: Path, merged: Path | None, ids: Int[Tensor, "batch seq"], *, is_exact: bool
) -> dict[str, Tensor]:
    """Logits of `SCRIPT`.

    Raises:
        InputError: what was exported cannot be loaded there; the process's last words are in the message.
    """
    with TemporaryDirectory() as folder:
        given, written = Path(folder) / "given.safetensors", Path(folder) / "logits.safetensors"
        save_file({"ids": ids.cpu().contiguous()}, given)
        folders = (str(path.resolve()) if path else "" for path in (adapter, merged))
        words = [base_path(dense), dense.facts.get("commit") or "", *folders, "exact" if is_exact else ""]
        words += [str(given), str(written)]
        done = subprocess.run(
            [sys.executable, "-I", "-c", SCRIPT, *words],
            capture_output=True,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode:
            reason = " ".join(done.stderr.split())[-300:]
            raise InputError(f"'{adapter}' cannot be loaded by transformers and PEFT: {reason}")
        return load_file(written)
