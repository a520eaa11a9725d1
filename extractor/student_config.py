"""What one student can be: everything that the dense families differ in, declared."""

from typing import no_type_check

from transformers import PreTrainedConfig


@no_type_check  # jaxtyping would check __init__ against the fields; transformers passes more
class StudentConfig(PreTrainedConfig):
    """Shape and options of a student; field names are transformers' own where one exists."""

    model_type = "sparsebridge_student"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    # Fewer than the heads: each serves a group of neighbouring heads (grouped-query attention).
    num_key_value_heads: int | None = None
    head_dim: int = 32
    intermediate_size: int = 1024
    max_position_embeddings: int = 256
    hidden_act: str = "gelu_pytorch_tanh"
    # post_act = act(gate_proj z) * up_proj z instead of act(up_proj z).
    gated_mlp: bool = False
    position_embedding_type: str = "learned"  # "learned", "rope" or "none"
    # As in transformers: one dict, or one per layer type.
    rope_parameters: dict | None = None
    # Which layers turn q and k by position (None: all of them, with "rope").
    rope_layers: list | None = None
    layer_types: list | None = None  # "full_attention" or "sliding_attention" per layer
    sliding_window: int | None = None
    # Attention and MLP read the same stream, so there is no site between them.
    parallel_residual: bool = False
    pre_norm: bool = True
    # RMSNorm with a gain on what attention and MLP write.
    post_norm: bool = False
    qk_norm: str | None = None  # RMSNorm with a gain per "head" or over the "full" projection
    rms_norm_eps: float = 1e-5
    qk_norm_eps: float = 1e-6
    attn_logit_softcapping: float | int | None = None
    final_logit_softcapping: float | int | None = None
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

    def __post_init__(self, **kwargs):
        layers = self.num_hidden_layers
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.layer_types = self.layer_types or ["full_attention"] * layers
        self.rope_layers = self.rope_layers or [self.position_embedding_type == "rope"] * layers
        super().__post_init__(**kwargs)
