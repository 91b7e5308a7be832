"""Where packs come from, and what evaluations ask: corpora, tokenizers, packing, loaders, tasks."""

from datamodules.packed_memory import PackedMemory
from datamodules.tasks import AnswerTask, NeedleTask, RetrievalTask

__all__ = ["AnswerTask", "NeedleTask", "PackedMemory", "RetrievalTask"]
