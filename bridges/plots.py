"""A figure on disk: one place that knows of matplotlib, the extra `plot`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

if TYPE_CHECKING:
    pass


def draw(path: Path, onto: Callable[..., bool], *values: object) -> bool:
    """Write `onto(figure, *values)` as SVG, the same bytes from the same numbers.

    False where there is nothing to draw, as `onto` says, and without matplotlib, as a line says.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        tqdm.write(f"{path} was not drawn: it needs matplotlib; pip install 'sparsebridge[plot]'")
        return False
    figure = Figure(layout="constrained")
    if not onto(figure, *values):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})
    return True
