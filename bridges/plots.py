"""A figure on disk: one place that knows of matplotlib, the extra `plot`."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm


def can_draw(path: Path) -> bool:
    """Whether matplotlib is installed; without it a line says that `path` was not drawn."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    tqdm.write(f"{path} was not drawn: it needs matplotlib; pip install 'sparsebridge[plot]'")
    return False


def draw(path: Path, onto: Callable[..., bool], *values: object) -> bool:
    """Write `onto(figure, *values)` as SVG, the same bytes from the same numbers.

    False where there is nothing to draw, as `onto` says, and without matplotlib, as a line says.
    """
    if not can_draw(path):
        return False
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    if not onto(figure, *values):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})
    return True
