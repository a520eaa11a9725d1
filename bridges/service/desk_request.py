"""What the live desk is asked. Apart from it, since models are imported only when a run's are loaded."""

from typing import Literal

from pydantic import Field

from extractor.config import Config


class DeskRequest(Config):
    """One setting of the desk."""

    task: str = Field(max_length=200)
    """Whose circuit the nodes are of."""
    nodes: tuple[str, ...] = Field(min_length=1, max_length=64)
    kind: Literal["patch", "mean", "zero", "steer"] = "patch"
    """To the values on the counterfactual, to the means over text, to zero; or `value` is added."""
    positions: Literal["all", "last", "from_last"] = "all"  # as `extractor.positions`, which imports torch
    strength: float = Field(1.0, ge=-100, le=100, allow_inf_nan=False)
    """0: the nodes' own values; 1: all the way; 2: as far again."""
    prompt: str = Field(min_length=1, max_length=4000)
    counterfactual: str | None = Field(None, max_length=4000)
    """The prompt that a patch takes its values from; of as many tokens, or with the same end."""
    value: float | None = Field(None, ge=-1e6, le=1e6, allow_inf_nan=False)
    """What steer adds to every node."""
    top: int = Field(8, ge=1, le=64)
    """Most likely tokens that are shown, before and after."""
    continuation: int = Field(0, ge=0, le=64)
    """New tokens, the most likely one each time. A patch holds on the prompt alone."""
    off_target: bool = False
    """Also measure what the edit does to held-out text; takes seconds."""
