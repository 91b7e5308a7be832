"""What callbacks share: the run's parts, and how to look at a model without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from datamodules import PackedMemory
from msa_train.errors import UserError
from msa_train.module import MemorySparseModule
from msa_train.strategies import complete, sharded


def packed_memory(data: Any, callback: L.Callback) -> PackedMemory:
    """The run's data.

    Args:
        data: The data module.
        callback: Who asks.

    Raises:
        UserError: It is of another class.
    """
    if not isinstance(data, PackedMemory):
        name = type(callback).__name__
        raise UserError(f"{name} needs data of class datamodules.PackedMemory: use that, or leave callbacks.{name} out")
    return data


def parts(
    trainer: L.Trainer, pl_module: L.LightningModule, callback: L.Callback
) -> tuple[PackedMemory, MemorySparseModule]:
    """The run's data and module.

    Raises:
        UserError: The data is of another class than datamodules.PackedMemory.
    """
    assert isinstance(pl_module, MemorySparseModule)
    return packed_memory(trainer.datamodule, callback), pl_module  # type: ignore[attr-defined]


@contextmanager
def whole(module: MemorySparseModule, here: bool = True) -> Iterator[None]:
    """Puts a plain, complete copy in the place of a model whose weights ZeRO stage 3 spreads over the ranks; a model
    that is whole stays. All ranks must enter.

    Args:
        module: The module.
        here: Whether this rank wants it; the others give their parts and go on.
    """
    spread = module.net
    if not sharded(spread):
        yield
        return
    blank = module.blueprint.blank(spread.backbone.config.vocab_size) if here else None
    complete(spread, blank)
    module.model = spread if blank is None else blank
    try:
        yield
    finally:
        module.model = spread


@contextmanager
def undisturbed(trainer: L.Trainer, module: MemorySparseModule) -> Iterator[None]:
    """The model in evaluation mode, in the run's precision, without gradients; then mode and random numbers are as they
    were."""
    modes = [(part, part.training) for part in module.modules()]
    cuda = module.device.type == "cuda"
    with isolate_rng(include_cuda=cuda), trainer.precision_plugin.forward_context(), torch.no_grad():
        module.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training
