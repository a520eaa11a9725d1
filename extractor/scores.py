"""What a weight counts for when the largest are kept: its size, alone or with what it works on.

- `magnitude`: |w| (Gao et al. 2025, section 2.1);
- `input`: |w| times the RMS of the channel that it reads, over the student's passes since the last projection
  (Wanda, Sun et al. 2023); embeddings, which read tokens, by |w|;
- `curvature`: |w| times the root of AdamW's running mean of squared gradients: w^2 times the Fisher diagonal
  is what its loss costs to second order (optimal brain damage, LeCun et al. 1989).

Both factors are functions of checkpointed state and the step's batch, so a resumed run selects alike.
"""

from collections.abc import Mapping

import torch
from accelerate.utils import reduce
from jaxtyping import Float
from torch import Tensor, nn

from extractor.sparsity import Score

Factors = Mapping[str, Float[Tensor, "..."]]  # by parameter; broadcast over its matrix


class WeightScores:
    """Factors of a student's matrices after every optimiser step; a context: at its end it stops looking."""

    def __init__(self, student: nn.Module, score: Score, optimizer: torch.optim.Optimizer):
        self.score = score
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.parameters = {name: own for name, own in student.named_parameters() if own.ndim == 2}
        self.squares: dict[str, Tensor] = {}  # summed over tokens
        self.is_read = False  # the next pass is another step's
        linears = [own for own in student.named_modules() if isinstance(own[1], nn.Linear)]
        self.hooks = [
            module.register_forward_pre_hook(self._note_as(f"{name}.weight"))
            for name, module in (linears if score == "input" else ())
        ]

    def __enter__(self) -> "WeightScores":
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _note_as(self, name: str):
        @torch.no_grad()
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # A pass that is run again in the backward pass counts twice; the factors stay as they are.
            if self.is_read:
                self.squares, self.is_read = {}, False
            squares = inputs[0].detach().float().square().flatten(0, -2).sum(0)
            self.squares[name] = self.squares[name] + squares if name in self.squares else squares

        return note

    @torch.no_grad()
    def factors(self) -> Factors:
        """What |weights| are multiplied with before the largest are chosen; empty for `magnitude`.

        A collective call for `input`: all processes select alike. Only ratios within a matrix matter.
        """
        if self.score == "curvature":
            state = self.optimizer.state
            return {
                name: state[own]["exp_avg_sq"].sqrt() for name, own in self.parameters.items() if own in state
            }
        self.is_read = True
        return {name: reduce(squares).sqrt() for name, squares in self.squares.items()}
