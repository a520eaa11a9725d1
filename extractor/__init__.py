"""The sparse world: students, tasks, circuits and interventions. Knows no dense model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from extractor.student import Student, StudentConfig

__all__ = ["Student", "StudentConfig"]


def __getattr__(name: str) -> Any:
    """Import the student when it is asked for: torch takes seconds, and much here needs none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from extractor import student

    return getattr(student, name)
