"""Search of a memory bank: the k best documents of each query, tile by tile, in memory that no bank's size changes.

A tile is a run of documents with their chunks' routing keys. Each is scored by MaxSim (kernels/maxsim.py), reduced to
documents and merged into a running top-k; nothing else outlives it.
The invariant: what is found depends on the documents alone, not on how they are cut into tiles or in which order tiles
come. So equal scores go to the lower number, and a candidate is one integer that says so: the score's ordinal above the
complement of the number. No two candidates are equal, and a plain top-k is exact.

Shapes: X routing tokens of all queries, Q queries, C chunks and D documents of a tile, B blocks of documents,
K documents kept, E excluded documents, L routed layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_train.errors import UserError
from msa_train.kernels.maxsim import ABSENT, Backend, RoutingKeys, document_ordinals, ordinals, scores
from msa_train.pack import TensorFields

LOW = 2**32 - 1
NOTHING = ABSENT << 32  # a candidate that is no document
BLOCK = 128  # documents of a tile of which only the best is compared, until k blocks are left


@dataclass(frozen=True)
class Tile(TensorFields):
    """A run of documents, all of whose chunks are here.

    Args:
        keys: Routing keys of the C chunks.
        document_C: The document of each chunk, counted from 0 in this tile, int64.
        number_D: The documents' stable numbers, 1 .. 2^32 - 2, ascending within the tile, int64.
        live_D: False for removed documents, which are never found; None if there are none.
    """

    keys: RoutingKeys
    document_C: Tensor
    number_D: Tensor
    live_D: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.document_C.shape == (len(self.keys),), f"{self.document_C.shape} of {len(self.keys)} chunks"
        assert self.live_D is None or self.live_D.shape == self.number_D.shape

    def __len__(self) -> int:
        return len(self.number_D)


@dataclass(frozen=True)
class Found(TensorFields):
    """The best documents of each query, best first.

    Args:
        number_QK: Their numbers, int64; -1 where nothing is left.
        score_QK: Their scores, float32; -inf where nothing is left.
    """

    number_QK: Tensor
    score_QK: Tensor


def search(
    tiles: Iterable[Tile],
    query_XR: Tensor,
    offsets_Q: Tensor,
    heads: int,
    k: int,
    excluded: Sequence[Sequence[int]] | None = None,
    backend: Backend = "auto",
) -> Found:
    """The k best documents of one routed layer.

    Args:
        tiles: The bank; no document is in two tiles. Tiles may be made as they are asked for.
        query_XR: q~ of the routing tokens, query after query, float32, on the tiles' device.
        offsets_Q: Where each query's tokens begin, Q + 1 values, int64; every query has at least one.
        heads: H, the divisor of the mean.
        k: Documents to find.
        excluded: For each query the numbers of documents that it must not get, a few.
        backend: That of `chunk_scores`.
    """
    return rank([tiles], [query_XR], offsets_Q, [1.0], heads, k, excluded, backend)


@torch.no_grad()
def rank(
    tiles_L: Sequence[Iterable[Tile]],
    query_LXR: Sequence[Tensor],
    offsets_Q: Tensor,
    weight_L: Sequence[float],
    heads: int,
    k: int,
    excluded: Sequence[Sequence[int]] | None = None,
    backend: Backend = "auto",
) -> Found:
    """The k best documents by the weighted mean of their scores over layers.

    Args:
        tiles_L: The bank's tiles of each layer: the same documents, cut alike.
        query_LXR: q~ of each layer.
        offsets_Q: As in `search`.
        weight_L: Weight of each layer; they need not sum to 1.
        heads: As in `search`.
        k: As in `search`.
        excluded: As in `search`.
        backend: As in `search`.

    Raises:
        UserError: A weight is negative or not finite, or all are 0.
    """
    assert k > 0 and len(tiles_L) == len(query_LXR) == len(weight_L)
    if not (all(0 <= weight < math.inf for weight in weight_L) and sum(weight_L) > 0):
        raise UserError(f"search: layer weights {list(weight_L)}: need finite ones from 0 up, at least one above 0")
    device, queries = query_LXR[0].device, len(offsets_Q) - 1
    layers = [
        _Layer(tiles, query_XR, offsets_Q, weight / sum(weight_L), heads, backend)
        for tiles, query_XR, weight in zip(tiles_L, query_LXR, weight_L, strict=True)
        if weight > 0
    ]
    excluded_QE = _excluded(excluded, queries, device)
    best_QK = torch.full((queries, k), NOTHING, dtype=torch.int64, device=device)
    for tile, ordinal_QD in _judged(*layers):
        if not len(tile):
            continue
        if tile.live_D is not None:
            ordinal_QD.masked_fill_(~tile.live_D, ABSENT)
        if excluded_QE is not None:
            _hide(ordinal_QD, tile.number_D, excluded_QE)
        best_QK = _merged(best_QK, _candidates(ordinal_QD, tile.number_D))
    ordinal_QK = (best_QK >> 32).to(torch.int32)
    return Found((LOW - (best_QK & LOW)).masked_fill_(ordinal_QK == ABSENT, -1), scores(ordinal_QK))


def candidates(score: Tensor, number: Tensor) -> Tensor:
    """One int64 for each document, the better the larger: by score, and of equal scores by the lower number.

    The complement of number 2 is 0xfffffffd, and 1.0 has the ordinal 0x3f800000; -1.0 has its negative, 0xc0800000 as
    an unsigned number.

    >>> rows = candidates(torch.tensor([1.0, -1.0, 0.0, -0.0]), torch.tensor([2, 2, 4, 3]))
    >>> [f"{row & 2**64 - 1:016x}" for row in rows.tolist()], rows.argsort(descending=True).tolist()
    (['3f800000fffffffd', 'c0800000fffffffd', '00000000fffffffb', '00000000fffffffc'], [0, 3, 2, 1])

    Args:
        score: float32.
        number: 0 .. 2^32 - 1, int64, of the same shape or one that broadcasts.
    """
    return _candidates(ordinals(score), number)


def _candidates(ordinal: Tensor, number: Tensor) -> Tensor:
    return torch.add(LOW - number, ordinal, alpha=2**32)


def _merged(best_QK: Tensor, candidate_QD: Tensor) -> Tensor:
    """The K best of both.

    A top-k over a million is slow, so blocks of documents are compared by their best first. What is not in the K best
    blocks has K better documents before it, one in each.
    """
    parts = [best_QK, candidate_QD]
    k, blocks = best_QK.shape[1], candidate_QD.shape[1] // BLOCK
    if blocks > k:
        rest_QD = candidate_QD[:, blocks * BLOCK :]
        block_QBD = candidate_QD[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
        chosen_QK = torch.topk(block_QBD.amax(2), k, sorted=False).indices
        chosen_QKD = block_QBD.gather(1, chosen_QK[:, :, None].expand(-1, -1, BLOCK))
        parts = [best_QK, chosen_QKD.flatten(1), rest_QD]
    return torch.topk(torch.cat(parts, 1), k).values


@dataclass(frozen=True)
class _Layer:
    """One layer's bank, query and weight."""

    tiles: Iterable[Tile]
    query_XR: Tensor
    offsets_Q: Tensor
    weight: float
    heads: int
    backend: Backend

    def judge(self, tile: Tile) -> Tensor:
        """Ordinals of a tile's documents, [Q, D]."""
        return document_ordinals(
            self.query_XR, self.offsets_Q, tile.keys, tile.document_C, len(tile), self.heads, self.backend
        )


def _judged(first: _Layer, *others: _Layer) -> Iterator[tuple[Tile, Tensor]]:
    """Tiles with the ordinals of their documents by the mean over layers.

    Layers take turns, so the keys of one are alive at a time.
    """
    parallel = [(layer, iter(layer.tiles)) for layer in others]
    for tile in first.tiles:
        ordinal_QD = first.judge(tile)
        if parallel:
            mean_QD = scores(ordinal_QD) * first.weight
            for layer, tiles in parallel:
                same = next(tiles, None)
                assert same is not None and len(same) == len(tile), "layers hold the same documents, cut alike"
                mean_QD.add_(scores(layer.judge(same)), alpha=layer.weight)
            ordinal_QD = ordinals(mean_QD)
        yield tile, ordinal_QD
    assert all(next(tiles, None) is None for _, tiles in parallel), "layers hold the same documents, cut alike"


def _excluded(excluded: Sequence[Sequence[int]] | None, queries: int, device: torch.device) -> Tensor | None:
    if excluded is None or not any(excluded):
        return None
    assert len(excluded) == queries, f"exclusions of {len(excluded)} queries, there are {queries}"
    most = max(map(len, excluded))
    rows = [[*numbers, *[0] * (most - len(numbers))] for numbers in excluded]  # no document has the number 0
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


def _hide(ordinal_QD: Tensor, number_D: Tensor, excluded_QE: Tensor) -> None:
    place_QE = torch.searchsorted(number_D, excluded_QE).clamp_max(len(number_D) - 1)
    most_QE = torch.where(number_D[place_QE] == excluded_QE, ABSENT, -ABSENT)
    ordinal_QD.scatter_reduce_(1, place_QE, most_QE.to(torch.int32), "amin")
