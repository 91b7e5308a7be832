"""What evaluations ask: memories, questions and what is right."""

from datamodules.tasks.corpus import AnswerTask, RetrievalTask
from datamodules.tasks.needles import NeedleTask

__all__ = ["AnswerTask", "NeedleTask", "RetrievalTask"]
