"""The weight-sparse student: a decoder whose pre-norms carry no scale, with one forward.

    x = x + AbsTopK(W_o attention(AbsTopK(W_q z), AbsTopK(W_k z), AbsTopK(W_v z))),  z = AbsTopK(RMSNorm(x))
    x = x + AbsTopK(W_2 AbsTopK(act(W_1 z))),                                        z = AbsTopK(RMSNorm(x))

(Gao et al. 2025, section 2.1 and appendix A.1.) Norm gains are folded into the next matrix, which
changes nothing and leaves the residual basis free. Every activation that is a node passes through the
`tap`; recording, masks, ablations and patches are taps, so there is no second forward anywhere.

What the dense families differ in is declared in `StudentConfig`, so that one student can be an exact copy
of any of them: positions, grouped-query attention, q/k norms, post-norms, gates, windows, soft caps.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXRotaryEmbedding,  # the one that knows partial rotary and every scaling of transformers
)

from extractor.cache_name import CACHE_NAME
from extractor.errors import InputError
from extractor.layers import GainNorm, LayerContext, StudentAttention, StudentLayer, StudentMLP
from extractor.sites import Site, Tap, no_tap, sites
from extractor.student_config import StudentConfig


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
        is_learned = config.position_embedding_type == "learned"
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if is_learned else None
        )
        self.rotary = rotary_tables(config)
        self.layers = nn.ModuleList(StudentLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.bigram = nn.Embedding(config.vocab_size, config.vocab_size) if config.bigram_table else None
        self.post_init()

    @property
    def sites(self) -> tuple[Site, ...]:
        return sites(self.config.num_hidden_layers, parallel=self.config.parallel_residual)

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
        cache: Cache | None = None,
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
            logits_to_keep: only the last so many positions (0: all); these positions; or, (batch, kept),
                these positions of every row.
            use_cache: off unless asked for (`generate` asks); taps run on whole prompts.
            cache, past_key_values: two names of one argument, see `extractor/cache_name.py`.
        """
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            tokens = input_ids if resid is None else resid
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None] + seen
        if resid is None:
            resid = self._embed(input_ids, position_ids)
        contexts = layer_contexts(self.config, self.rotary, resid, attention_mask, position_ids, cache)
        first = start or Site(0, "resid_pre")
        for layer in self.layers[first.layer :]:
            skip_attention = layer.layer == first.layer and first.stream == "resid_mid"
            resid = layer(resid, contexts[layer.layer], tap, skip_attention)
        resid = tap("final_resid", resid)
        final = keep_positions(resid, logits_to_keep)
        final = F.rms_norm(final, final.shape[-1:], eps=self.config.rms_norm_eps)
        logits = self.lm_head(final)
        if self.bigram is not None:
            logits = logits + self.bigram(keep_positions(input_ids, logits_to_keep))
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: cache})

    def _embed(self, input_ids: Tensor, position_ids: Tensor) -> Float[Tensor, "batch seq d_sparse"]:
        tokens = self.embed_tokens(input_ids)
        return tokens if self.embed_positions is None else tokens + self.embed_positions(position_ids)

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
        elif isinstance(module, GainNorm):
            init.ones_(module.weight)
        elif isinstance(module, StudentAttention) and module.sink is not None:
            init.zeros_(module.sink)
        else:
            super()._init_weights(module)  # the rotary tables, which no file holds


def keep_positions(x: Shaped[Tensor, "batch seq *rest"], keep: int | Tensor) -> Tensor:
    """Positions of every row, as `logits_to_keep` of `Student.forward` names them."""
    if isinstance(keep, int):
        return x[:, -keep:] if keep else x
    if keep.ndim == 1:
        return x[:, keep]
    return x[torch.arange(len(x), device=x.device)[:, None], keep]


def layer_contexts(
    config: StudentConfig,
    rotary: nn.ModuleDict,
    resid: Float[Tensor, "batch seq d_sparse"],
    attention_mask: Tensor | None,
    position_ids: Tensor,
    cache: Cache | None,
) -> list[LayerContext]:
    """Mask and rotation of each layer; layers of one type share them."""
    masks, ropes = {}, {}
    for kind in set(config.layer_types):
        make = create_causal_mask if kind == "full_attention" else create_sliding_window_causal_mask
        masks[kind] = make(
            config=config,
            inputs_embeds=resid,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
        )
        ropes[kind] = rotary[kind](resid, position_ids) if kind in rotary else None
    return [
        LayerContext(masks[kind], ropes[kind] if turned else None, cache)
        for kind, turned in zip(config.layer_types, config.rope_layers, strict=True)
    ]


def rotary_tables(config: StudentConfig) -> nn.ModuleDict:
    """Rotary tables per layer type; none without rotary positions."""
    if config.position_embedding_type != "rope":
        return nn.ModuleDict()
    tables = {}
    for kind in sorted(set(config.layer_types)):
        of_kind = copy.copy(config)
        of_kind.rope_parameters = config.rope_parameters.get(kind, config.rope_parameters)
        tables[kind] = GPTNeoXRotaryEmbedding(of_kind)
    return nn.ModuleDict(tables)


def load_student(folder: Path, device: torch.device | str = "cpu") -> tuple[Student, PreTrainedTokenizerBase]:
    """A trained student and its tokenizer from a run folder.

    Raises:
        InputError: no student there, or damaged weights.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"no student in '{folder}'; recipes/train.py writes it")
    try:
        student = Student.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"the student in '{folder}' cannot be read ({error})") from None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return student.to(device).eval(), tokenizer


AutoConfig.register(StudentConfig.model_type, StudentConfig)
AutoModel.register(StudentConfig, Student)
AutoModelForCausalLM.register(StudentConfig, Student)
