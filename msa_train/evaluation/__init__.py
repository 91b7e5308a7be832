"""Evaluation: what a model still finds and answers as its memory grows."""

from msa_train.evaluation.task import Asked, Memory, Task, Trial

__all__ = ["Asked", "Memory", "Task", "Trial"]
