"""A circuit as a small dense model: only its nodes are computed, everything else is folded into constants.

Nodes outside the circuit are frozen at their means, so they are constants of the next matrix's bias:

    y_kept = W[kept, kept] x_kept + (b + W[kept, frozen] mean_frozen)

RMSNorm stays exact: the squares of the channels that no kept node reads or writes depend on the token and its
position alone, and are summed once per forward for all norms. A frozen v channel comes through attention as
it is (weights over keys sum to one; with an attention sink they do not, and then every head is computed).

AbsTopK ranks kept and frozen channels against each other. The export does not change what a circuit means:
ranks are those of the masked student, so a node that is ranked (or normalised: q/k norms, post-norms) is
computed whole, from kept inputs, and only then cut down to its kept channels.

The same model serves while masks are learned (`extractor.prune`) and as an export (`save`, `load`).
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from extractor.artifacts import SCHEMA_VERSION, read_json, replace_folder
from extractor.compact_layers import CompactAttention, CompactMLP, frozen_means, is_ranked
from extractor.errors import InputError
from extractor.layers import LayerContext, StudentLayer
from extractor.masks import Live, Means
from extractor.sites import Tap, no_tap, node_addresses
from extractor.sparsity import abs_topk
from extractor.student import Student, keep_positions, layer_contexts, rotary_tables
from extractor.student_config import StudentConfig

SEMANTICS = "nodes outside the circuit are frozen at their means, after AbsTopK has ranked all channels"
MODEL_FILE, FACTS_FILE = "model.safetensors", "compact.json"


class CompactStudent(nn.Module):
    """The student with all but some nodes frozen at their means: exact, and as small as those nodes."""

    @torch.no_grad()
    def __init__(self, student: Student, live: Live, means: Means):
        """Fold a student around the kept channels (ascending, by address; a missing address keeps none).

        Embeddings and unembedding are shared with the student, not copied.
        """
        super().__init__()
        self.config = config = student.config
        empty = torch.zeros(0, dtype=torch.long)
        addresses = node_addresses(config.num_hidden_layers)
        self.live = {address: live.get(address, empty).cpu() for address in addresses}
        used = [channels for address, channels in self.live.items() if _is_stream(address)]
        width = config.hidden_size
        stream = torch.arange(width) if is_ranked(config.activation_frac) else torch.cat(used).unique()
        self.register_buffer("stream", stream, persistent=False)
        self.register_buffer("is_rest", torch.ones(width).index_fill(0, stream, 0.0), persistent=False)
        self.rotary = rotary_tables(config)
        self.embed_tokens, self.embed_positions = student.embed_tokens, student.embed_positions
        self.lm_head, self.bigram = student.lm_head, student.bigram
        self.layers = nn.ModuleList(CompactLayer(layer, self.live, means, stream) for layer in student.layers)
        self.register_buffer("frozen_writes", self._frozen_writes(means))
        self.requires_grad_(False).to(student.device if student.device.type != "meta" else None).eval()

    def _frozen_writes(self, means: Means) -> Float[Tensor, "norm d_sparse"]:
        """What frozen nodes have written by every norm: two norms a layer, and the final one."""
        written = torch.zeros_like(means["0.attn.resid_delta"])
        rows = []
        for layer in range(self.config.num_hidden_layers):
            before = written
            written = before + frozen_means(means, self.live, f"{layer}.attn.resid_delta")
            # Parallel sublayers read one stream.
            rows += [before, before if self.config.parallel_residual else written]
            written = written + frozen_means(means, self.live, f"{layer}.mlp.resid_delta")
        return torch.stack([*rows, written])

    @property
    def device(self) -> torch.device:
        return self.frozen_writes.device

    @property
    def num_nodes(self) -> int:
        return sum(map(len, self.live.values()))

    def matrix_channels(self, name: str, source: str, target: str) -> tuple[list[int], list[int]]:
        """Channels of the source and of the target that a matrix's columns and rows stand for."""
        module = self.get_submodule(name)
        if source.endswith(".v"):  # one column per query head of a v channel's group
            columns = self.layers[int(source.partition(".")[0])].attn.o_channels.tolist()
        else:
            columns = self.live[source].tolist()
        live = self.live[target].tolist()
        rows = live if len(module.weight) == len(live) else list(range(len(module.weight)))
        return columns, rows

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        logits_to_keep: int | Tensor = 0,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        tap: Tap = no_tap,
    ) -> CausalLMOutputWithPast:
        """Next-token logits of the student as this circuit, on whole prompts (from position 0, unless given).

        Args:
            tap: called with the kept channels of every address whose sublayer has a kept write.
            logits_to_keep, attention_mask, position_ids: as those of `Student.forward`.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        base = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            base = base + self.embed_positions(position_ids)
        rest_squares = self._rest_squares(base)
        contexts = layer_contexts(self.config, self.rotary, base, attention_mask, position_ids, None)
        frozen = self.frozen_writes[:, self.stream]
        resid = base[..., self.stream]
        for index, layer in enumerate(self.layers):
            reads = [(frozen[i], rest_squares[..., i : i + 1]) for i in (2 * index, 2 * index + 1)]
            resid = layer(resid, reads, contexts[index], tap)
        final = keep_positions(base, logits_to_keep)
        final = final.index_copy(-1, self.stream, keep_positions(resid, logits_to_keep))
        final = final + self.frozen_writes[-1]
        logits = self.lm_head(F.rms_norm(final, final.shape[-1:], eps=self.config.rms_norm_eps))
        if self.bigram is not None:
            logits = logits + self.bigram(keep_positions(input_ids, logits_to_keep))
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        return CausalLMOutputWithPast(logits=logits)

    def _rest_squares(self, base: Float[Tensor, "batch seq d_sparse"]) -> Float[Tensor, "batch seq norm"]:
        """Sum of squares, at every norm, of the channels that no kept node reads or writes."""
        frozen = self.frozen_writes * self.is_rest
        with torch.autocast(base.device.type, enabled=False):
            squares = base.square() @ self.is_rest  # sum of (base + frozen)^2, without a copy per norm
            return squares[..., None] + base @ (2 * frozen).T + frozen.square().sum(-1)

    def save(self, folder: Path, facts: Mapping[str, object]) -> None:
        """Write the weights (safetensors) and compact.json: kept channels, semantics and `facts`."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        description = {
            "schema_version": SCHEMA_VERSION,
            "semantics": SEMANTICS,
            **facts,
            "nodes": {address: channels.tolist() for address, channels in self.live.items()},
            "student_config": self.config.to_dict(),
        }

        def write(target: Path) -> None:
            save_file(tensors, target / MODEL_FILE)
            text = json.dumps(description, indent=1, allow_nan=False)
            (target / FACTS_FILE).write_text(text, encoding="utf-8")

        replace_folder(folder, write)

    @classmethod
    def load(cls, folder: Path) -> "CompactStudent":
        """Read what `save` wrote; the student is not needed.

        Raises:
            InputError: missing, damaged, or of another schema version.
        """
        value = read_json(folder / FACTS_FILE, "compact circuit", "recipes/extract.py --export true")
        try:
            config = StudentConfig.from_dict(value["student_config"])
            live = {name: torch.tensor(kept, dtype=torch.long) for name, kept in value["nodes"].items()}
            with torch.device("meta"):
                student = Student(config)
                means = {name: torch.zeros(width) for name, width in node_widths(config).items()}
            compact = cls(student, live, means)
            compact.load_state_dict(load_file(folder / MODEL_FILE), assign=True)
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"compact circuit '{folder}' is damaged ({error})") from None
        return compact.requires_grad_(False).eval()


class CompactLayer(nn.Module):
    """One layer around the kept channels of the stream."""

    def __init__(self, layer: StudentLayer, live: Live, means: Means, stream: Tensor):
        super().__init__()
        self.prefix = layer.layer
        self.eps, self.frac, self.is_parallel = layer.eps, layer.frac, layer.is_parallel
        self.width = layer.attn.q_proj.in_features
        self.attn = CompactAttention(layer.attn, live, means)
        self.mlp = CompactMLP(layer.mlp, live, means)
        for name in ("attn.act_in", "attn.resid_delta", "mlp.act_in", "mlp.resid_delta"):
            where = torch.searchsorted(stream, live[f"{layer.layer}.{name}"])
            self.register_buffer(name.replace(".", "_"), where, persistent=False)

    def forward(
        self, resid: Tensor, reads: list[tuple[Tensor, Tensor]], context: LayerContext, tap: Tap
    ) -> Float[Tensor, "batch seq stream"]:
        before = resid
        # A sublayer whose writes are all frozen is a constant, which `frozen_writes` holds.
        if len(self.attn_resid_delta):
            act_in = tap(f"{self.prefix}.attn.act_in", self._read(resid, *reads[0])[..., self.attn_act_in])
            write = self.attn(act_in, context, tap)
            resid = resid.index_add(-1, self.attn_resid_delta, write.to(resid.dtype))
        if len(self.mlp_resid_delta):
            stream = before if self.is_parallel else resid
            act_in = tap(f"{self.prefix}.mlp.act_in", self._read(stream, *reads[1])[..., self.mlp_act_in])
            resid = resid.index_add(-1, self.mlp_resid_delta, self.mlp(act_in, tap).to(resid.dtype))
        return resid

    def _read(self, resid: Tensor, frozen: Tensor, rest_squares: Tensor) -> Float[Tensor, "batch seq stream"]:
        stream = resid + frozen
        if self.eps is not None:
            squares = stream.square().sum(-1, keepdim=True) + rest_squares
            stream = stream * torch.rsqrt(squares / self.width + self.eps)
        return abs_topk(stream, self.frac)


def node_widths(config: StudentConfig) -> dict[str, int]:
    """Channels at every address that holds nodes."""
    kv_width = config.num_key_value_heads * config.head_dim
    widths = {
        "q": config.num_attention_heads * config.head_dim,
        "k": kv_width,
        "v": kv_width,
        "post_act": config.intermediate_size,
    }
    addresses = node_addresses(config.num_hidden_layers)
    return {address: widths.get(address.rpartition(".")[2], config.hidden_size) for address in addresses}


def _is_stream(address: str) -> bool:
    return address.endswith(("act_in", "resid_delta"))
