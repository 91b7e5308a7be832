"""PackSource: what training, and the commands around it, ask of a data module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from transformers import PreTrainedTokenizerBase

from msa_train.errors import UserError
from msa_train.findings import Finding


class PackSource(L.LightningDataModule):
    """A data module whose loaders yield MemoryPacks."""

    val_splits: tuple[str, ...] = ()

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer, with the protocol's control tokens, once `setup` has run."""

    @abstractmethod
    def describe(self) -> str:
        """One line on what the run reads."""

    def pack(self) -> None:
        """Tokenises what is not tokenised yet, and reports."""
        raise UserError(f"{type(self).__name__} has nothing to tokenise beforehand")

    def mine(self, model: Any, folder: Path, pool_tokens: int) -> None:
        """Mines negatives with a trained router and writes them to `folder`."""
        raise UserError(f"{type(self).__name__} mines no negatives")

    def longest(self) -> int:
        """Tokens of the longest document or context; 0 where that is not known."""
        return 0

    def packs_at_once(self, ranks: int) -> int:
        """Packs that so many ranks read at once: one each, unless ranks share packs."""
        return ranks

    def examine(self, packs_per_step: int, steps: int) -> Sequence[Finding]:
        """What can be known of the data before training."""
        return [Finding("data", "class", type(self).__name__)]
