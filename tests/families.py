"""Every family of the table as a tiny random model, and the README's table of what is proved on them.

    python -m tests.families            # prints the table
    python -m tests.families --write    # and puts it into README.md

Weights are drawn wide and norms and biases away from their defaults: with transformers' own start (gains
of one, biases of zero, tiny weights) a forgotten gain would go unseen.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bridges.dense import DenseModel
from bridges.families import FAMILIES
from bridges.losses import kl_divergence, log_probs
from bridges.warm_start import StudentShape, make_student
from extractor.rotation import RotationConfig

WIDTHS = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
SLIDING = {"sliding_window": 5}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# Row of the table -> model type and what differs from WIDTHS.
TINY: dict[str, tuple[str, dict]] = {
    "GPT-2": ("gpt2", GPT2),
    "GPT-NeoX, Pythia (parallel)": ("gpt_neox", {"use_parallel_residual": True, **PARTIAL}),
    "GPT-NeoX (serial)": ("gpt_neox", {"use_parallel_residual": False, **PARTIAL}),
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Llama": ("llama", {"head_dim": 8, "tie_word_embeddings": False}),
    "Llama (llama3 rope scaling)": (
        "llama",
        {
            "head_dim": 12,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),  # fmt: skip
    "Mistral (sliding window)": ("mistral", {"head_dim": 8, **SLIDING}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 12}),
    "Gemma": ("gemma", {"head_dim": 12}),
    "Gemma 2": ("gemma2", {"head_dim": 12, "query_pre_attn_scalar": 20, **SLIDING}),
    "Gemma 3 (text)": (
        "gemma3_text",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            **SLIDING,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),  # fmt: skip
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}),
    "Phi": ("phi", {**PARTIAL}),
    "Phi-3": (
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.5, 2.0, 2.5],
                "long_factor": [1.5, 2.0, 3.0, 4.0],
                "original_max_position_embeddings": 16,
            },
        },
    ),  # fmt: skip
    "StableLM": ("stablelm", {"use_qkv_bias": True, **PARTIAL}),
    "StableLM (parallel)": ("stablelm", {"use_parallel_residual": True, **PARTIAL}),
    "Falcon (7B)": ("falcon", {"ffn_hidden_size": 48, "bias": True}),
    "Falcon (40B)": ("falcon", {"ffn_hidden_size": 48, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "GPT-J": ("gptj", {**GPT2, "rotary_dim": 4}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "Granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),  # fmt: skip
    "Arcee": ("arcee", {}),
    "StarCoder2": ("starcoder2", {**SLIDING}),
    "Cohere": ("cohere", {"logit_scale": 0.25}),
    "GPT-BigCode": ("gpt_bigcode", GPT2),
    "GPT-Neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    ),
    "CodeGen": ("codegen", {**GPT2, "rotary_dim": 4}),
    "Nemotron": ("nemotron", {}),
    "GLM": ("glm", {"head_dim": 8}),
    "Mixtral": ("mixtral", EXPERTS),
    "Qwen2-MoE": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 24}),
    "Qwen3-MoE": ("qwen3_moe", {"head_dim": 8, **EXPERTS}),
    "OLMoE": ("olmoe", EXPERTS),
    "gpt-oss": ("gpt_oss", {"head_dim": 8, **EXPERTS, **SLIDING}),
}


def tiny_model(row: str, seed: int = 0) -> PreTrainedModel:
    """A random model of this row of the table, 2 layers of 32 channels."""
    model_type, changes = TINY[row]
    default = AutoConfig.for_model(model_type)
    widths = {k: v for k, v in WIDTHS.items() if hasattr(default, k) and k not in default.attribute_map}
    values = {**widths, **changes}
    config = type(default)(**values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # gains, shifts, biases
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" in name or "wte" in name:
                parameter.copy_(torch.randn_like(parameter))
            else:
                parameter.copy_(1.5 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    model.generation_config.eos_token_id = None
    return model


def tokens(length: int = 24) -> torch.Tensor:
    return torch.randint(3, 97, (3, length), generator=torch.Generator().manual_seed(1))


def copy_error(dense: DenseModel, *, wider: bool, rotate: bool = True) -> float:
    """KL(dense || student) in nats/token of the warm start, at the dense width or wider."""
    config, group = dense.config, 1
    spec = dense.family.copy
    if wider:
        q, k, _ = spec.qkv(dense.blocks[0], config)
        group = len(q[0]) // len(k[0])
    shape = StudentShape(
        hidden_size=45 if wider else 0,
        intermediate_size=71 if wider else 0,
        num_attention_heads=config.num_attention_heads + 2 * group if wider else 0,
    )
    rotation = RotationConfig(enabled=rotate, stream_steps=6, head_steps=4)
    student, _ = make_student(dense, shape, rotation)
    ids = tokens()
    with torch.no_grad():
        reference = log_probs(dense.run(ids, record=False).logits)
        return kl_divergence(reference, log_probs(student(ids).logits)).item()


def tail_error(dense: DenseModel) -> float:
    """Largest relative change of the logits when only the tail from a site runs, over all sites."""
    with torch.no_grad():
        run = dense.run(tokens())
        scale = run.logits.abs().max()
        errors = [(dense.run_from(s, run.resid[s]) - run.logits).abs().max() / scale for s in dense.sites]
    return max(errors).item()


def table() -> str:
    """The README's table, measured now."""
    lines = [
        "| family | `model_type` | sites per layer | tail from any site | exact copy: KL | wider copy: KL |",
        "|---|---|---|---|---|---|",
    ]
    for row, (model_type, _) in TINY.items():
        dense = DenseModel(tiny_model(row))
        sites = 1 if dense.is_parallel else 2
        if dense.family.copy is None:
            copies = f"no: {dense.family.no_copy} | "
        else:
            copies = " | ".join(_bound(copy_error(dense, wider=wider)) for wider in (False, True))
        lines.append(f"| {row} | `{model_type}` | {sites} | {_bound(tail_error(dense))} | {copies} |")
    return "\n".join(lines)


def _bound(value: float) -> str:
    """An upper bound that another machine's rounding does not move."""
    exponents = range(-9, 1)
    return "0" if value == 0 else next(f"<= 1e{e}" for e in exponents if abs(value) <= 10.0**e)


def main() -> None:
    text = table()
    sys.stdout.write(text + "\n")
    if "--write" in sys.argv:
        readme = Path(__file__).parents[1] / "README.md"
        before, rest = readme.read_text(encoding="utf-8").split("<!-- families -->\n")
        after = rest.split("<!-- /families -->\n")[1]
        readme.write_text(f"{before}<!-- families -->\n{text}\n<!-- /families -->\n{after}", encoding="utf-8")


if __name__ == "__main__":
    missing = set(FAMILIES) - {model_type for model_type, _ in TINY.values()}
    assert not missing, f"no tiny model for {missing}"
    main()
