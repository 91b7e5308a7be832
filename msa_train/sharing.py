"""Sharing: several ranks read one pack, so that a memory may be longer than one card holds.

Every rank encodes a run of the documents. What a routed layer remembers of them, one row of K, V and routing key per
chunk, is gathered from all ranks, and each reads its run of the contexts over all documents. The gradient of a chunk is
the sum of what the contexts of all ranks make of it, and comes back to the rank that encoded it.

The invariant: shares are the pack. Every document and every context is in exactly one, in order, and the losses and
gradients of all shares add up to those of the pack.

Shapes: C chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from msa_train.errors import UserError
from msa_train.pack import MemoryPack, Shares


def share(pack: MemoryPack, rank: int, ranks: int, dealt: bool = True) -> MemoryPack:
    """What one of several ranks holds of a pack; on the host, before a device sees it.

    Documents and contexts are cut into runs of nearly as many tokens. A rank that no context is left for reads the last
    one again, without label or positive: it must take part in every collective. Counts of the step stay the step's.

    Args:
        pack: The whole pack.
        rank: Which of the ranks that share it.
        ranks: How many they are.
        dealt: Deal the contexts out. Otherwise the first rank reads them all: some metrics are of a whole pack.

    Raises:
        UserError: There are fewer documents than ranks.
    """
    documents, contexts = pack.documents, pack.contexts
    if len(documents.lengths) < ranks:
        raise UserError(
            f"data.document_parallel is {ranks}, but pack {pack.index} has {len(documents.lengths)} documents: let "
            "fewer ranks share a pack, or raise data.document_tokens"
        )
    held = cuts(documents.lengths, ranks)
    read = cuts(contexts.offsets_Q.diff()[1:].tolist(), min(pack.queries, ranks) if dealt else 1)
    repeats = rank >= len(read) - 1
    first, last = (pack.queries - 1, pack.queries) if repeats else read[rank : rank + 2]
    contexts = contexts.part(first, last)
    positive_QD = pack.positive_QD[first:last]
    if repeats:
        none = contexts.label_index_N[:0]
        contexts = replace(contexts, label_index_N=none, label_target_N=none, label_query_N=none)
        positive_QD = torch.zeros_like(positive_QD)
    # the longest chunk is full, or no document fills one
    chunk_size = int(documents.chunk_offsets_C.diff().max())
    return replace(
        pack,
        documents=documents.part(held[rank], held[rank + 1], chunk_size),
        contexts=contexts,
        positive_QD=positive_QD,
        excluded_QD=pack.excluded_QD[first:last],
        query_ids=pack.query_ids[first:last],
        query_steps=pack.query_steps[first:last],
        asked=int(positive_QD.any(1).sum()),
        shares=Shares(
            chunks=documents.chunks,
            chunk_counts=tuple(documents.chunks.offsets_D[held].diff().tolist()),
            rank=rank,
            tokens=pack.tokens,
            queries=pack.queries,
        ),
    )


def cuts(lengths: Sequence[int], runs: int) -> list[int]:
    """Where to cut a row into runs of nearly equal sums, none of them empty.

    >>> cuts([5, 1, 1, 1, 4], 2), cuts([9, 1, 1], 3)
    ([0, 2, 5], [0, 1, 2, 3])
    """
    ends, found = [0, *accumulate(lengths)], [0]
    for run in range(1, runs):
        left = range(found[-1] + 1, len(lengths) - (runs - run) + 1)
        found.append(min(left, key=lambda cut: abs(ends[cut] * runs - ends[-1] * run)))
    return [*found, len(lengths)]


def gather(shares: Shares, *rows_C: Tensor) -> tuple[Tensor, ...]:
    """The rows of all ranks' chunks, of this rank's; with gradient, in one collective. All ranks must call it.

    Args:
        shares: How many rows each rank has.
        rows_C: Tensors with a row for every chunk of this rank, any trailing dimensions.

    Returns:
        The same with a row for every chunk of the pack, each in its dtype.
    """
    return _Gather.apply(shares, _group(dist.group.WORLD, shares.ranks), *rows_C)


@functools.cache
def _group(world: Any, ranks: int) -> Any:
    """The consecutive ranks that this one shares packs with."""
    return world if ranks == dist.get_world_size(world) else dist.new_subgroups(ranks)[0]


class _Gather(torch.autograd.Function):
    """Collectives want equal sizes, so rows are padded; counts are known on the host, so nothing waits."""

    @staticmethod
    def forward(ctx: Any, shares: Shares, group: Any, *rows_C: Tensor) -> tuple[Tensor, ...]:
        assert dist.get_rank(group) == shares.rank
        ctx.shares, ctx.group, ctx.dtypes = shares, group, [rows.dtype for rows in rows_C]
        joined = torch.cat([rows.flatten(1) for rows in rows_C], 1)  # in the widest dtype, so exact
        padded = F.pad(joined, (0, 0, 0, max(shares.chunk_counts) - len(joined)))
        parts = [torch.empty_like(padded) for _ in shares.chunk_counts]
        dist.all_gather(parts, padded, group=group)
        whole = torch.cat([part[:count] for part, count in zip(parts, shares.chunk_counts, strict=True)])
        gathered = tuple(
            columns.to(rows.dtype).reshape(-1, *rows.shape[1:]).contiguous()
            for columns, rows in zip(whole.split([rows[0].numel() for rows in rows_C], 1), rows_C, strict=True)
        )
        # keys and values of a frozen backbone stay without a graph
        wanted = ctx.needs_input_grad[2:]
        ctx.mark_non_differentiable(*(rows for rows, want in zip(gathered, wanted, strict=True) if not want))
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted, counts = ctx.needs_input_grad[2:], ctx.shares.chunk_counts
        kept = [gradient for gradient, want in zip(gradients, wanted, strict=True) if want]
        # float32: in bfloat16 every rank's summand would be rounded
        whole = torch.cat([part.flatten(1).to(torch.promote_types(part.dtype, torch.float32)) for part in kept], 1)
        dist.all_reduce(whole, group=ctx.group)
        own = whole.split(counts)[ctx.shares.rank]
        columns = iter(own.split([part[0].numel() for part in kept], 1))
        given = [
            next(columns).to(dtype).reshape(-1, *gradient.shape[1:]) if want else None
            for gradient, dtype, want in zip(gradients, ctx.dtypes, wanted, strict=True)
        ]
        return None, None, *given
