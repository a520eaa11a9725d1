"""What a patch flips over strengths, beside random nodes and random directions of the same size.

Everything by the *indirect* effect, and the patch by the total one, too. A random direction has the norm of
the edit at every token: where it flips as much, a push is enough, and the edit's direction says nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.edit import Edit
from bridges.search import EditConfig
from bridges.streams import PromptStreams
from extractor.sites import Node


@torch.no_grad()
def measure_edit(
    streams: PromptStreams, edit: Edit, bridges: BridgeSet, config: EditConfig, seed: int
) -> dict[str, object]:
    """Flip rates over strengths: total, indirect, and the two controls by their indirect effect."""
    generator = torch.Generator().manual_seed(seed)
    delta = streams.delta(edit)
    random_nodes = [
        streams.delta(_random_node_edit(edit, bridges, generator)) for _ in range(config.control_draws)
    ]
    random_directions = [_random_direction(delta, generator) for _ in range(config.control_draws)]
    curves = {
        name: [_rates(streams, edit, deltas, strength) for strength in config.strengths]
        for name, deltas in (("edit", [delta]), ("nodes", random_nodes), ("direction", random_directions))
    }
    inside = torch.arange(delta.shape[1], device=delta.device) <= streams.batch.last[:, None]
    norms = (delta.norm(dim=-1) * inside).sum() / inside.sum()
    resid_norms = (bridges.centred(streams.resid[edit.site]).norm(dim=-1) * inside).sum() / inside.sum()
    return {
        "size": len(edit.nodes),
        "strengths": list(config.strengths),
        "flip_rate": [total for total, _ in curves["edit"]],
        "flip_rate_indirect": [indirect for _, indirect in curves["edit"]],
        "control_random_node": [indirect for _, indirect in curves["nodes"]],
        "control_random_direction": [indirect for _, indirect in curves["direction"]],
        "control_draws": config.control_draws,
        "delta_norm_ratio": (norms / resid_norms).item(),
        "num_prompts": len(streams.batch),
        "num_right_before": int((streams.unedited > 0).sum()),
    }


@torch.no_grad()
def random_direction_rate(
    streams: PromptStreams, edit: Edit, strength: float, config: EditConfig, seed: int
) -> float:
    """Mean indirect flip rate of random directions of the edit's size."""
    generator = torch.Generator().manual_seed(seed)
    delta = streams.delta(edit)
    directions = [_random_direction(delta, generator) for _ in range(config.control_draws)]
    return _rates(streams, edit, directions, strength)[1]


def _rates(
    streams: PromptStreams, edit: Edit, deltas: Sequence[Tensor], strength: float
) -> tuple[float, float]:
    """Mean total and indirect rate at the edit's site; at strength 0 nothing is added, so nothing flips."""
    if strength == 0:
        return 0.0, 0.0
    both = [streams.differences(edit.site, strength * delta) for delta in deltas]
    total, indirect = ([streams.flip_rate(d[effect]) for d in both] for effect in (0, 1))
    return sum(total) / len(both), sum(indirect) / len(both)


def _random_node_edit(edit: Edit, bridges: BridgeSet, generator: torch.Generator) -> Edit:
    """As many other nodes of the same site, drawn from all its channels."""
    width = bridges[edit.site].decoder.in_features
    taken = {node.channel for node in edit.nodes}
    free = [c for c in torch.randperm(width, generator=generator).tolist() if c not in taken]
    nodes = [Node(edit.site.read_address, channel) for channel in free[: len(edit.nodes)]]
    return Edit.from_nodes(nodes, edit.site, bridges)


def _random_direction(delta: Tensor, generator: torch.Generator) -> Tensor:
    """One random direction, at every token with the norm that the edit has there."""
    direction = torch.randn(delta.shape[-1], generator=generator).to(delta)
    return delta.norm(dim=-1, keepdim=True) * direction / direction.norm()
