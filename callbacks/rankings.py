"""RankingWriter: what `msa-train predict` leaves behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter


class RankingWriter(BasePredictionWriter):
    """Writes `rankings.jsonl` into the run's folder: per held-out query its best documents, scores and positives.

    With several ranks, each writes its own file: `rankings-{rank}.jsonl`.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the file."""
        name = "rankings.jsonl" if trainer.world_size == 1 else f"rankings-{trainer.global_rank}.jsonl"
        self.file = Path(trainer.default_root_dir) / name
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Adds a pack's queries."""
        with self.file.open("a") as handle:
            for row in prediction:
                handle.write(json.dumps(row, ensure_ascii=False) + "\n")
