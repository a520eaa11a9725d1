"""What nodes cost in a circuit: more, where they matter on text at large.

All tasks share what the student needs to read any text. Of two nodes that serve a task alike, a search for
few nodes takes either; the one that the rest needs less makes the circuit more of the task's own, and its
removal harms other tasks less. No task's prompts are looked at here.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from extractor.masks import GateTap, Means, NodeMasks
from extractor.student import Student

BLOCKS, AT_ONCE = 24, 8  # of text
MOST = 0.99  # the quantile of the nodes that counts as what text needs most
AT_MOST = 3.0  # times that: a few nodes are far above it


def node_prices(
    student: Student, blocks: Int[Tensor, "block seq"], means: Means, general_price: float
) -> Float[Tensor, " node"] | None:
    """One for every node, and `general_price` times its importance on text; None where that is zero.

    Importance is the mean size of the first-order change of a block's cross-entropy when the node is frozen
    at its mean, in units of what the most important hundredth of the nodes have at least.
    """
    if general_price == 0:
        return None
    masks = NodeMasks(means, [0])
    changes = []
    for ids in blocks[:BLOCKS].to(student.device).split(AT_ONCE):
        gates = torch.ones(len(ids), len(masks.part_of_node), device=ids.device, requires_grad=True)
        logits = student(ids, tap=GateTap(masks)(gates)).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        (slopes,) = torch.autograd.grad(loss.view(len(ids), -1).mean(1).sum(), gates)
        changes.append(slopes.abs())
    importance = torch.cat(changes).mean(0)
    unit = importance.quantile(MOST).clamp(min=torch.finfo(importance.dtype).tiny)  # none may matter
    return 1 + general_price * (importance / unit).clamp(max=AT_MOST)
