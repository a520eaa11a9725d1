"""The weight-sparse student: a pre-norm decoder whose norms carry no scale, with one forward.

    x = x + AbsTopK(W_o attention(AbsTopK(W_q z), AbsTopK(W_k z), AbsTopK(W_v z))),  z = AbsTopK(RMSNorm(x))
    x = x + AbsTopK(W_2 AbsTopK(act(W_1 z))),                                        z = AbsTopK(RMSNorm(x))

(Gao et al. 2025, section 2.1 and appendix A.1.) Norm gains are folded into the next matrix, which
changes nothing and leaves the residual basis free. Every activation that is a node passes through the
`tap`; recording, masks, ablations and patches are taps, so there is no second forward anywhere.
"""

from pathlib import Path
from typing import no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from extractor.errors import InputError
from extractor.machine import attend
from extractor.sites import Site, Tap, no_tap, sites
from extractor.sparsity import abs_topk


@no_type_check  # jaxtyping would check __init__ against the fields; transformers passes more
class StudentConfig(PreTrainedConfig):
    """Shape and options of a student; field names are transformers' own where one exists."""

    model_type = "sparsebridge_student"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    head_dim: int = 32
    intermediate_size: int = 1024
    max_position_embeddings: int = 256
    hidden_act: str = "gelu_pytorch_tanh"
    rms_norm_eps: float = 1e-5
    # AbsTopK: share of channels kept at every node address (None: off).
    activation_frac: float | int | None = None
    # A learned logit per head that attention can spend on nothing (appendix A.1).
    attention_sink: bool = False
    # A learned vocab x vocab table added to the logits by the current token (appendix A.1).
    bigram_table: bool = False
    # The share of nonzero weights in every sparse matrix; 1.0 before training.
    density: float | int = 1.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False


class StudentAttention(nn.Module):
    """Causal attention with separate q, k, v matrices and AbsTopK at its nodes."""

    def __init__(self, config: StudentConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.frac = config.activation_frac
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width)
        self.k_proj = nn.Linear(config.hidden_size, width)
        self.v_proj = nn.Linear(config.hidden_size, width)
        self.o_proj = nn.Linear(width, config.hidden_size)
        self.sink = nn.Parameter(torch.zeros(config.num_attention_heads)) if config.attention_sink else None

    def forward(
        self,
        act_in: Float[Tensor, "batch seq d_sparse"],
        mask: Tensor | None,
        cache: Cache | None,
        tap: Tap,
    ) -> Float[Tensor, "batch seq d_sparse"]:
        prefix = f"{self.layer}.attn"
        # AbsTopK over all heads together, as the paper's code does.
        q = tap(f"{prefix}.q", abs_topk(self.q_proj(act_in), self.frac))
        k = tap(f"{prefix}.k", abs_topk(self.k_proj(act_in), self.frac))
        v = tap(f"{prefix}.v", abs_topk(self.v_proj(act_in), self.frac))
        q, k, v = (self._split_heads(x) for x in (q, k, v))  # (batch, head, seq, d_head)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if self.sink is not None:
            k, v, mask = self._add_sink(q, k, v, mask)

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            bias = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
            is_causal = mask is None and q.shape[2] > 1
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal)

        mixed = attend(sdpa, q, k, v)
        write = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return tap(f"{prefix}.resid_delta", abs_topk(write, self.frac))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _add_sink(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One more key and value, both zero, whose logit is the head's sink."""
        batch, heads, queries, _ = q.shape
        keys = k.shape[2]
        if mask is None:
            visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
            mask = visible.tril(keys - queries)[None, None]  # (1, 1, query, key)
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        bias = bias.expand(batch, heads, queries, keys)
        sink = self.sink.to(q.dtype)[None, :, None, None].expand(batch, heads, queries, 1)
        return F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), torch.cat([sink, bias], dim=-1)


class StudentMLP(nn.Module):
    """Two matrices and an activation, with AbsTopK at neurons and writes."""

    def __init__(self, config: StudentConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.frac = config.activation_frac
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(
        self, act_in: Float[Tensor, "batch seq d_sparse"], tap: Tap
    ) -> Float[Tensor, "batch seq d_sparse"]:
        prefix = f"{self.layer}.mlp"
        post_act = tap(f"{prefix}.post_act", abs_topk(self.act(self.up_proj(act_in)), self.frac))
        return tap(f"{prefix}.resid_delta", abs_topk(self.down_proj(post_act), self.frac))


class StudentLayer(nn.Module):
    """Attention and MLP around one residual stream; runs from either of its two sites."""

    def __init__(self, config: StudentConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.eps = config.rms_norm_eps
        self.frac = config.activation_frac
        self.attn = StudentAttention(config, layer)
        self.mlp = StudentMLP(config, layer)

    def forward(
        self,
        resid: Float[Tensor, "batch seq d_sparse"],
        mask: Tensor | None,
        cache: Cache | None,
        tap: Tap,
        skip_attention: bool,
    ) -> Float[Tensor, "batch seq d_sparse"]:
        if not skip_attention:
            resid = tap(f"{self.layer}.resid_pre", resid)
            act_in = tap(f"{self.layer}.attn.act_in", abs_topk(self._norm(resid), self.frac))
            resid = resid + self.attn(act_in, mask, cache, tap)
        resid = tap(f"{self.layer}.resid_mid", resid)
        act_in = tap(f"{self.layer}.mlp.act_in", abs_topk(self._norm(resid), self.frac))
        return resid + self.mlp(act_in, tap)

    def _norm(self, resid: Tensor) -> Tensor:
        return F.rms_norm(resid, resid.shape[-1:], eps=self.eps)


class Student(PreTrainedModel, GenerationMixin):
    """A weight-sparse causal language model; zeros in its matrices are ordinary exact zeros."""

    config_class = StudentConfig
    config: StudentConfig
    base_model_prefix = ""
    _no_split_modules = ["StudentLayer"]
    _supports_sdpa = True

    def __init__(self, config: StudentConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(StudentLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.bigram = nn.Embedding(config.vocab_size, config.vocab_size) if config.bigram_table else None
        self.post_init()

    @property
    def sites(self) -> tuple[Site, ...]:
        return sites(self.config.num_hidden_layers)

    def set_activation_frac(self, frac: float | None) -> None:
        """Change AbsTopK at every node; None or 1 switches it off."""
        self.config.activation_frac = frac
        for module in self.modules():
            if isinstance(module, StudentLayer | StudentAttention | StudentMLP):
                module.frac = frac

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def sparse_matrices(self) -> dict[str, nn.Parameter]:
        """The matrices that weight sparsity applies to: all of them but the bigram table."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.ndim == 2 and not name.startswith("bigram")
        }

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        tap: Tap = no_tap,
        start: Site | None = None,
        resid: Float[Tensor, "batch seq d_sparse"] | None = None,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Next-token logits.

        Args:
            tap: called at every node address, at every site and at `final_resid`.
            start, resid: begin at this site with this residual stream instead of the embeddings.
            logits_to_keep: only the last so many positions (0: all), or these positions.
            use_cache: off unless asked for (`generate` asks); taps run on whole prompts.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if resid is None:
            resid = self._embed(input_ids, position_ids, past_key_values)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=resid,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        first = start or Site(0, "resid_pre")
        for layer in self.layers[first.layer :]:
            skip_attention = layer.layer == first.layer and first.stream == "resid_mid"
            resid = layer(resid, mask, past_key_values, tap, skip_attention)
        resid = tap("final_resid", resid)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        final = F.rms_norm(resid[:, keep], resid.shape[-1:], eps=self.config.rms_norm_eps)
        logits = self.lm_head(final)
        if self.bigram is not None:
            logits = logits + self.bigram(input_ids[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _embed(
        self, input_ids: Tensor, position_ids: Tensor | None, cache: Cache | None
    ) -> Float[Tensor, "batch seq d_sparse"]:
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + seen
        return self.embed_tokens(input_ids) + self.embed_positions(position_ids)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Random start: N(0, 0.02), writes scaled by 1/sqrt(2 layers), zero biases and bigrams."""
        std = self.config.initializer_range
        if module is self.bigram:
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            is_write = any(module in (layer.attn.o_proj, layer.mlp.down_proj) for layer in self.layers)
            scale = (2 * self.config.num_hidden_layers) ** -0.5 if is_write else 1.0
            init.normal_(module.weight, mean=0.0, std=std * scale)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, StudentAttention) and module.sink is not None:
            init.zeros_(module.sink)


def load_student(folder: Path, device: torch.device | str = "cpu") -> tuple[Student, PreTrainedTokenizerBase]:
    """A trained student and its tokenizer from a run folder.

    Raises:
        InputError: no student there, or damaged weights.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"no student in '{folder}'; recipes/train.py writes it")
    try:
        student = Student.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"the student in '{folder}' cannot be read ({error})") from None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return student.to(device).eval(), tokenizer


AutoConfig.register(StudentConfig.model_type, StudentConfig)
AutoModel.register(StudentConfig, Student)
AutoModelForCausalLM.register(StudentConfig, Student)
