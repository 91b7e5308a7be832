"""A bank as one routed layer of a model sees it: what it finds becomes a small memory that attention can read.

Queries that are read together may each have a bank of their own. The invariant: a layer attends to the documents that
it found and to no other, wherever they were kept.

Shapes: C chunks, Q queries, X routing tokens, K selected documents, G key/value heads, W head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

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


@dataclass(frozen=True)
class BanksLayer:
    """A bank for every query, as one routed layer sees them.

    Args:
        banks: One per query. Neighbours with the same bank are searched together.
        layer: Place of the layer among the routed ones.
        excluded: Numbers that each query must not get.
    """

    banks: Sequence[Searched]
    layer: int
    excluded: Sequence[Sequence[int]]

    def choose(self, query_XR: Tensor, offsets_Q: Tensor, heads: int, top_k: int) -> Chosen[Recalled]:
        """Searches each bank for its queries; what they found stands side by side."""
        bounds, chosen, first = offsets_Q.tolist(), list[Chosen[Recalled]](), 0
        for _, run in groupby(self.banks, id):
            last = first + len(list(run))
            layer = BankLayer(self.banks[first], self.layer, self.excluded[first:last])
            offsets = offsets_Q[first : last + 1] - bounds[first]
            chosen.append(layer.choose(query_XR[bounds[first] : bounds[last]], offsets, heads, top_k))
            first = last
        return chosen[0] if len(chosen) == 1 else _side_by_side(chosen, query_XR)


def _side_by_side(parts: Sequence[Chosen[Recalled]], query_XR: Tensor) -> Chosen[Recalled]:
    """What queries chose from banks of their own, as one choice."""
    counts = [count for part in parts for count in part.chunks.offsets_D.diff().tolist()]
    before, places = 0, []
    for part in parts:
        place_QK = part.selected_QK
        places.append(torch.where(place_QK >= 0, place_QK + before, place_QK))
        before += part.chunks.documents
    found = Found(
        _stacked([part.found.found.number_QK for part in parts], -1),
        _stacked([part.found.found.score_QK for part in parts], -torch.inf),
    )
    return Chosen(
        torch.cat([part.key_CGW for part in parts]),
        torch.cat([part.value_CGW for part in parts]),
        ChunkLayout.of_counts(counts).to(query_XR.device),
        _stacked(places, -1),
        Recalled(found, query_XR),
    )


def _stacked(rows: Sequence[Tensor], nothing: float) -> Tensor:
    """Rows of several tables below one another, the shorter ones filled up."""
    width = max(row.shape[1] for row in rows)
    return torch.cat([pad(row, (0, width - row.shape[1]), value=nothing) for row in rows])
