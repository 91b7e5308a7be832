"""Decoding: contexts read over a memory, then extended token by token.

The first reading is the training forward's; what every layer attended to is kept, and each further token attends to
that and to its own past. So the invariant: extending a context gives the states of reading it whole, and a batch those
of its members alone. Contexts of a batch share nothing but the launch: they may be of any length and end at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msa_train.attention import Found, LayerCache, RoutedMemory
from msa_train.model import MemorySparseModel
from msa_train.pack import Context, Contexts


@dataclass
class Decoding:
    """A context that goes on.

    Args:
        caches: What it attends to in every decoder layer.
        position: Global position of its next token.
    """

    caches: list[LayerCache]
    position: int


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
    caches: list[list[LayerCache]] = []
    hidden_AM, found_L = model.consult(layout, memories, caches=caches)
    last_Q = layout.offsets_Q[2:].long() - 1
    positions = [len(head) + model.config.top_k + len(context.tokens) for context in contexts]
    by_context = [[layer[place] for layer in caches] for place in range(len(contexts))]
    decodings = [Decoding(kept, position) for kept, position in zip(by_context, positions, strict=True)]
    return model.logits(hidden_AM[last_Q]), decodings, found_L, layout.routing_offsets_Q


@torch.inference_mode()
def extend(model: MemorySparseModel, decodings: Sequence[Decoding], tokens: Sequence[Sequence[int]]) -> Tensor:
    """Goes on with further tokens.

    Args:
        model: The model.
        decodings: The contexts; they grow.
        tokens: New tokens of each, at least one.

    Returns:
        Logits of the token after each context's last [Q, V].
    """
    device = next(model.parameters()).device
    lengths = [len(new) for new in tokens]
    spans = [range(one.position, one.position + n) for one, n in zip(decodings, lengths, strict=True)]
    hidden_AM = model.extend(
        torch.tensor([token for new in tokens for token in new], device=device),
        torch.tensor([place for span in spans for place in span], device=device),
        list(zip(*(one.caches for one in decodings), strict=True)),
        lengths,
    )
    for one, length in zip(decodings, lengths, strict=True):
        one.position += length
    last_Q = torch.tensor(lengths, device=device).cumsum(0) - 1
    return model.logits(hidden_AM[last_Q])
