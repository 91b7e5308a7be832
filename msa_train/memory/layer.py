"""A bank as one routed layer of a model sees it: what it finds becomes a small memory that attention can read.

The invariant: a layer attends to the documents that it found and to no other, wherever they were kept.

Shapes: C chunks, Q queries, X routing tokens, K selected documents, G key/value heads, W head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from msa_train.attention import Chosen
from msa_train.pack import ChunkLayout
from msa_train.search import Found


class Searched(Protocol):
    """A bank, whole or over ranks; see `MemoryBank`."""

    def search(
        self,
        layer: int,
        query_XR: Tensor,
        offsets_Q: Tensor,
        heads: int,
        k: int,
        excluded: Sequence[Sequence[int]] | None = None,
    ) -> Found:
        """The k best documents of each query in one layer."""
        ...

    def read(self, layer: int, numbers: Sequence[int]) -> tuple[list[int], Tensor, Tensor]:
        """Pooled keys and values of documents."""
        ...


@dataclass(frozen=True)
class Recalled:
    """What a routed layer found in a bank.

    Args:
        found: Numbers and scores of the selected documents.
        query_XR: The routing queries, with which other documents can be scored later.
    """

    found: Found
    query_XR: Tensor


@dataclass(frozen=True)
class BankLayer:
    """A bank as one routed layer sees it.

    Args:
        bank: The bank.
        layer: Place of the layer among the routed ones.
        excluded: Numbers that each query must not get.
    """

    bank: Searched
    layer: int
    excluded: Sequence[Sequence[int]] | None = None

    def choose(self, query_XR: Tensor, offsets_Q: Tensor, heads: int, top_k: int) -> Chosen[Recalled]:
        """Searches, and brings the selected documents' keys and values to the device."""
        found = self.bank.search(self.layer, query_XR, offsets_Q, heads, top_k, self.excluded)
        number_QK = found.number_QK.cpu()
        most = int((number_QK >= 0).sum(1).max())
        number_QK = number_QK[:, :most].contiguous()
        numbers = sorted(set(number_QK[number_QK >= 0].tolist()))
        counts, key_CGW, value_CGW = self.bank.read(self.layer, numbers)
        place_QK = torch.searchsorted(torch.tensor(numbers, dtype=torch.int64), number_QK)
        return Chosen(
            key_CGW,
            value_CGW,
            ChunkLayout.of_counts(counts).to(key_CGW.device),
            place_QK.masked_fill(number_QK < 0, -1).to(key_CGW.device),
            Recalled(found, query_XR),
        )
