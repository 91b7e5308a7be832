"""Decoding: contexts read over a memory, then extended token by token.

The first reading is the training forward's; what every layer attended to is kept, and each further token attends to
that and to its own past. So the invariant: extending a context gives the states of reading it whole, and a batch those
of its members alone. Contexts of a batch share nothing but the launch: they may be of any length, begin and end at any
time, and wait while others go on.

In every layer the keys of all contexts lie in one tensor, and so do the values: those of a context together, with room
behind them. A step writes the new ones where they belong and gathers what its contexts attend to. Where that is, is
worked out once for all layers, on the host, and sent in one copy. When there is no room left, or contexts of different
readings meet, what goes on is laid out anew.

Shapes: A new tokens, Q contexts, L decoder layers, N rows of keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from msa_train.attention import Found, LayerCache, LayerStep, RoutedMemory
from msa_train.kernels.varlen import Sequences
from msa_train.model import MemorySparseModel
from msa_train.pack import Context, Contexts

ROOM = 64  # tokens; a step gathers all rows anyway, so laying them out anew once in so many steps costs next to nothing


@dataclass(eq=False)
class Caches:
    """What contexts that lie together attend to.

    Args:
        layers: Keys and values [N, G, W] of every decoder layer.
        contexts: Those that may still go on: one that nobody holds any more loses its place.
    """

    layers: list[tuple[Tensor, Tensor]]
    contexts: WeakSet[Decoding] = field(default_factory=WeakSet)


@dataclass(eq=False)
class Decoding:
    """A context that goes on.

    Args:
        caches: Where its keys and values are.
        first_L: Its first row in every layer.
        length_L: Its rows there; layers differ by the documents that they chose.
        room: Tokens that may come behind them.
        position: Global position of its next token.
    """

    caches: Caches
    first_L: np.ndarray
    length_L: np.ndarray
    room: int
    position: int

    def __post_init__(self) -> None:
        self.caches.contexts.add(self)


@torch.inference_mode()
def begin(
    model: MemorySparseModel, head: Sequence[int], contexts: Sequence[Context], memories: Sequence[RoutedMemory[Found]]
) -> tuple[Tensor, list[Decoding], list[Found], Tensor]:
    """Reads contexts over a memory.

    Args:
        model: The model.
        head: Tokens of the template head.
        contexts: What stands before the first token to write, of every query.
        memories: The memory as every routed layer sees it.

    Returns:
        Logits of the next token [Q, V]; the contexts, ready to go on; what every routed layer found; where each
        query's routing tokens begin (Q + 1 values, int64).
    """
    device = next(model.parameters()).device
    layout = Contexts.build(head, contexts).to(device)
    kept: list[LayerCache] = []
    hidden_AM, found_L = model.consult(layout, memories, caches=kept)
    last_Q = layout.offsets_Q[2:].long() - 1
    bounds = torch.stack([cache.offsets for cache in kept]).cpu().numpy().astype(np.int64)
    first_LQ, length_LQ = bounds[:, 1:-1], np.diff(bounds)[:, 1:]  # behind the head, which attends to itself
    caches = Caches([(cache.key_NGW, cache.value_NGW) for cache in kept])
    start = len(head) + model.config.top_k
    decodings = [
        Decoding(caches, first_LQ[:, place], length_LQ[:, place], 0, start + len(context.tokens))
        for place, context in enumerate(contexts)
    ]
    return model.logits(hidden_AM[last_Q]), decodings, found_L, layout.routing_offsets_Q


@torch.inference_mode()
def extend(model: MemorySparseModel, decodings: Sequence[Decoding], tokens: Sequence[Sequence[int]]) -> Tensor:
    """Goes on with further tokens. Nothing here waits for the device.

    Args:
        model: The model.
        decodings: The contexts, of any readings; they grow.
        tokens: New tokens of each, at least one.

    Returns:
        Logits of the token after each context's last [Q, V].
    """
    added = [len(new) for new in tokens]
    if len({one.caches for one in decodings}) > 1 or any(
        new > one.room for one, new in zip(decodings, added, strict=True)
    ):
        _lay_out(dict(zip(decodings, added, strict=True)))
    hidden_AM, last_Q = _extended(model, decodings, tokens, np.array(added))
    for one, new in zip(decodings, added, strict=True):
        one.length_L, one.room, one.position = one.length_L + new, one.room - new, one.position + new
    return model.logits(hidden_AM.index_select(0, last_Q))


def _extended(
    model: MemorySparseModel, decodings: Sequence[Decoding], tokens: Sequence[Sequence[int]], added_Q: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Last states of new tokens of contexts that lie together with room for them, and the rows of each one's last."""
    first_LQ = np.stack([one.first_L for one in decodings], 1)
    before_LQ = np.stack([one.length_L for one in decodings], 1)
    length_LQ = before_LQ + added_Q
    queries, keys_L = _offsets(added_Q), _offsets(length_LQ)
    place_A = np.arange(queries[-1]) - np.repeat(queries[:-1], added_Q)  # of a token among its context's new ones
    position_A = np.repeat([one.position for one in decodings], added_Q) + place_A
    token_A = np.concatenate([np.asarray(new, np.int64) for new in tokens])

    token, position, last_Q, first, end, length, added, key_offsets, query_offsets = _sent(
        next(model.parameters()).device, token_A, position_A, queries[1:] - 1,
        first_LQ, first_LQ + before_LQ, length_LQ, np.broadcast_to(added_Q, first_LQ.shape), keys_L, queries,
    )  # fmt: skip
    seen_LN = _runs(first, length, keys_L[:, -1])
    new_LA = _runs(end, added, np.full(len(first_LQ), len(token_A)))
    query_offsets, longest = query_offsets.int(), int(added_Q.max())
    steps = [
        LayerStep(key, value, seen_N, new_A, Sequences(query_offsets, offsets, longest, most))
        for (key, value), offsets, most, seen_N, new_A in zip(
            decodings[0].caches.layers, key_offsets.int(), length_LQ.max(1).tolist(), seen_LN, new_LA, strict=True
        )
    ]
    return model.extend(token, position, steps), last_Q


def _lay_out(added: dict[Decoding, int]) -> None:
    """Lays contexts out together, with room for new tokens, and with them whatever lay beside them; a layer at a time,
    so that there is hardly more than one copy of all at any time.

    Args:
        added: The contexts, and how many tokens come to each.
    """
    laid, together = Caches([]), list(dict.fromkeys(one.caches for one in added))
    contexts: list[Decoding] = []
    firsts: list[np.ndarray] = []
    beside_L = np.zeros_like(next(iter(added)).first_L)  # rows of the caches before these
    for caches in together:
        members = list(caches.contexts)
        contexts += members
        firsts += [one.first_L + beside_L for one in members]
        beside_L = beside_L + [len(key) for key, _ in caches.layers]
    room_Q = np.array([added.get(one, 0) + ROOM for one in contexts])
    size_LQ = np.stack([one.length_L for one in contexts], 1) + room_Q
    first, size = _sent(together[0].layers[0][0].device, np.stack(firsts, 1), size_LQ)
    for rows_N, last in zip(_runs(first, size, size_LQ.sum(1)), beside_L - 1, strict=True):
        parts = [caches.layers.pop(0) for caches in together]
        rows_N = rows_N.clamp_max(int(last))  # what fills the room is nobody's
        key, value = (torch.cat(rows).index_select(0, rows_N) for rows in zip(*parts, strict=True))
        laid.layers.append((key, value))
    first_LQ = size_LQ.cumsum(1) - size_LQ
    for place, one in enumerate(contexts):
        one.caches, one.first_L, one.room = laid, first_LQ[:, place], int(room_Q[place])
        laid.contexts.add(one)


def _runs(first_LQ: Tensor, length_LQ: Tensor, sizes_L: np.ndarray) -> tuple[Tensor, ...]:
    """The rows of every layer that runs make up, one after another.

    >>> _runs(torch.tensor([[4, 0], [7, 9]]), torch.tensor([[2, 3], [1, 0]]), np.array([5, 1]))
    (tensor([4, 5, 0, 1, 2]), tensor([7]))

    Args:
        first_LQ: First row of each run.
        length_LQ: Its rows.
        sizes_L: Sum of lengths of every layer, known on the host.
    """
    length_R, rows = length_LQ.flatten(), int(sizes_L.sum())
    moved_R = first_LQ.flatten() - (length_R.cumsum(0) - length_R)
    row_N = torch.arange(rows, device=first_LQ.device) + moved_R.repeat_interleave(length_R, output_size=rows)
    return row_N.split(sizes_L.tolist())


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """Cumulative lengths along the last dimension, from 0 on."""
    return np.concatenate([np.zeros_like(lengths[..., :1]), lengths.cumsum(-1)], -1)


def _sent(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """Arrays of int64 on the device, in one copy."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory()  # from other memory the copy would make the host wait
    parts = flat.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
