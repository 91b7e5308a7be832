"""Callbacks that tests put into runs of their own."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning as L
import torch


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
