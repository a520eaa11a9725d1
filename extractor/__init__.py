"""The sparse world: students, tasks, circuits and interventions. Knows no dense model."""

from extractor.student import Student, StudentConfig

__all__ = ["Student", "StudentConfig"]
