"""Tokens per second over the time that really passed, data waits and all."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch

from msa_train.pack import MemoryPack


class Throughput(L.Callback):
    """Logs `speed/tokens_per_s`, `speed/queries_per_s` and `memory/peak_gib`, over all ranks.

    Counts what passed between two logging steps and divides by the time between them; evaluations and checkpoints in
    between are left out. Ranks read equally long packs, so rank 0's count times the world size serves.
    """

    def __init__(self) -> None:
        self.tokens = self.queries = 0
        self.started: float | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: MemoryPack, batch_idx: int
    ) -> None:
        """Starts the clock after a pause."""
        if self.started is None:
            self._restart()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: MemoryPack, batch_idx: int
    ) -> None:
        """Counts, and logs at the interval."""
        self.tokens += batch.tokens
        self.queries += batch.queries
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not (stepped and every) or trainer.global_step % every or self.started is None:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()  # at the logging interval only, where the values are read anyway
            peak = torch.cuda.max_memory_allocated() / 2**30
            pl_module.log("memory/peak_gib", peak, batch_size=1)
        seconds = max(time.perf_counter() - self.started, 1e-9)
        world = trainer.world_size
        pl_module.log("speed/tokens_per_s", self.tokens * world / seconds, batch_size=1, prog_bar=True)
        pl_module.log("speed/queries_per_s", self.queries * world / seconds, batch_size=1)
        self._restart()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        self.started = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stops the clock."""
        self.started = None

    def _restart(self) -> None:
        self.tokens = self.queries = 0
        self.started = time.perf_counter()
