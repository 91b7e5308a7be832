"""Callbacks that tests put into runs of their own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from msa_train.optimizer_state import zero_state
from msa_train.strategies import ZeRO, gathered


class KillAt(L.Callback):
    """Ends every rank with SIGKILL after a step, as a pre-emption without warning would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Kills."""
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class BreakGradient(L.Callback):
    """Puts a NaN into one gradient at one step, and remembers the weights around it."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.before: dict[str, torch.Tensor] = {}
        self.after: dict[str, torch.Tensor] = {}

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Breaks."""
        if trainer.global_step == self.step:
            self.before = {name: weight.detach().clone() for name, weight in pl_module.named_parameters()}
            weight = next(weight for weight in pl_module.parameters() if weight.grad is not None)
            weight.grad.view(-1)[0] = torch.nan  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Remembers."""
        if trainer.global_step == self.step + 1 and not self.after:
            self.after = {name: weight.detach().clone() for name, weight in pl_module.named_parameters()}


class Trials(L.Callback):
    """What may go wrong on one rank of several, and what each rank's weights are: nothing may hang or differ.

    Args:
        out: File for the digests of all complete weights, before and after training.
        bare: Step at which the last rank's pack has neither a label nor a positive.
        broken: Step at which the last rank's gradient is not finite.
    """

    def __init__(self, out: str, bare: int = -1, broken: int = -1) -> None:
        self.out, self.bare, self.broken = Path(out), bare, broken
        self.digests: dict[str, dict[str, str]] = {}

    def _here(self, trainer: L.Trainer, step: int) -> bool:
        return trainer.global_step == step and trainer.global_rank == trainer.world_size - 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remembers."""
        self.digests["start"] = digests(gathered(pl_module))
        self.digests["buffers"] = digests(pl_module.named_buffers())
        strategy = trainer.strategy
        zero = isinstance(strategy, ZeRO)
        self.digests["state"] = digests(zero_state(pl_module, strategy.deepspeed_engine)) if zero else {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        """Empties a pack."""
        if self._here(trainer, self.bare):
            batch.positive_QD.zero_()
            for name in ("label_index_N", "label_target_N", "label_query_N"):
                object.__setattr__(batch.contexts, name, getattr(batch.contexts, name)[:0])

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        """Breaks a gradient."""
        if self._here(trainer, self.broken):
            loss.register_hook(lambda gradient: gradient * torch.nan)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes."""
        self.digests["end"] = digests(gathered(pl_module))
        self.out.with_name(f"{self.out.stem}-{trainer.global_rank}.json").write_text(json.dumps(self.digests))


def digests(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """A digest of every weight's bytes."""
    return {
        name: hashlib.sha256(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, weight in weights
    }
