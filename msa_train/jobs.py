"""The jobs around training: tokenising, the doctor, the estimate, mining negatives. None of them needs a trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich import get_console

from msa_train.doctor import examine, world_size
from msa_train.errors import UserError
from msa_train.estimate.reading import card_of, read
from msa_train.estimate.report import print_estimate
from msa_train.findings import print_findings
from msa_train.module import MemorySparseModule
from msa_train.source import PackSource


class Trainer(L.Trainer):
    """Lightning's trainer, whose methods are the subcommands; the further ones are static."""

    @staticmethod
    def pack(datamodule: PackSource) -> None:
        """Tokenise the corpora of a config, once, and report what is in them.

        Takes the configs of a run, or --data.corpus and --data.tokenizer alone. `fit` does the same where it has not
        been done; a build that is broken off goes on.

        Args:
            datamodule: The run's data.
        """
        _packs(datamodule).pack()

    @staticmethod
    def doctor(
        model: MemorySparseModule,
        datamodule: PackSource,
        config: Any,
        start: Callable[[], Path | None],
        callbacks: Sequence[Any],
    ) -> None:
        """Say what is wrong with a run before a GPU is rented for it. Exit code 0 or 1.

        Takes the arguments of `fit`. Tokenises the corpora if that has not been done.
        """
        if not print_findings(examine(model, _packs(datamodule), config, start, callbacks), get_console()):
            sys.exit(1)

    @staticmethod
    def estimate(model: MemorySparseModule, config: Any, card: str = "H100", card_gib: float | None = None) -> None:
        """Say what a step will take of a GPU, memory and time, without one. Exit code 0, or 1 where it does not fit.

        Takes the arguments of `fit`. Looks at no corpus.

        Args:
            model: The run's model.
            config: The run's configuration.
            card: H100, H100-PCIe, H100-NVL, H200, H800, H20, B200, A100-40GB, A100-80GB, A800, L40S or RTX4090. Times
                follow from what an H200 measured, whose peak is an H100's; for other cards they are scaled by the
                vendors' data sheets.
            card_gib: Memory of the card in GiB, where it has another.
        """
        run = read(model, config, world_size(config.trainer))
        if not print_estimate(run, *card_of(card, card_gib), get_console()):
            sys.exit(1)

    @staticmethod
    def mine(
        model: MemorySparseModule, datamodule: PackSource, checkpoint: Path, out: str, pool_tokens: int = 1_048_576
    ) -> None:
        """Mine hard negatives with a trained router, for `data.negatives` of another run.

        Args:
            model: The run's model.
            datamodule: The run's data.
            checkpoint: Whose router.
            out: Folder to write to.
            pool_tokens: Tokens of the sample of the corpus that every training query is read over.
        """
        if pool_tokens < 1:
            raise UserError(f"--pool_tokens is {pool_tokens}: give at least 1")
        if not out or (Path(out).exists() and not Path(out).is_dir()):
            raise UserError(f"--out '{out}' is no folder: give one, or a name that is free")
        net = model.blueprint.restored(checkpoint, len(_packs(datamodule).tokenizer)).eval()
        datamodule.mine(net.to("cuda" if torch.cuda.is_available() else "cpu"), Path(out), pool_tokens)
        get_console().print(f"negatives   {out}", soft_wrap=True, highlight=False, markup=False)


def _packs(datamodule: L.LightningDataModule) -> PackSource:
    if not isinstance(datamodule, PackSource):
        raise UserError(
            f"data: {type(datamodule).__name__} is no msa_train.source.PackSource, which this command asks for packs: "
            "give another --data, like datamodules.PackedMemory"
        )
    return datamodule
