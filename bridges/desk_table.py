"""The recorded desk as rows of a table: what each node and setting does, averaged over its prompts."""

from collections.abc import Sequence
from typing import Any

from bridges.drawing import finite, number, percent, signed
from bridges.report_values import at, listed


def desk_rows(desk: Any) -> list[list[str]]:
    """Node, setting, mean change of the student's and of the dense model's margin, and shares flipped.

    The margin is answer minus distractor, in logits; a prompt is flipped if it was right and is wrong.
    """
    rows = []
    for i, node in enumerate(listed(at(desk, "nodes"))):
        for j, setting in enumerate(listed(at(desk, "settings"))):
            name = f"{at(setting, 'target')}, strength {number(at(setting, 'strength'))}"
            found = [_effect(desk, model, i, j) for model in ("student", "dense")]
            rows.append(
                [
                    node,
                    name,
                    *(signed(change) for change, _ in found),
                    *(percent(flips) for _, flips in found),
                ]
            )
    return rows


def _effect(desk: Any, model: str, node: int, setting: int) -> tuple[Any, Any]:
    before = listed(at(desk, "unedited", model))
    after = listed(at(desk, model, node, setting))
    pairs = [(finite(a), finite(b)) for a, b in zip(before, after, strict=False)]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not known or len(known) < len(before):
        missing = {"undefined": "a prompt has no recorded answer"}
        return missing, missing
    change = sum(b - a for a, b in known) / len(known)
    return change, _share_flipped(known)


def _share_flipped(known: Sequence[tuple[float, float]]) -> Any:
    right = [(a, b) for a, b in known if a > 0]
    if not right:
        return {"undefined": "no prompt was answered right"}
    return sum(b < 0 for _, b in right) / len(right)
