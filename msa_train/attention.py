"""MemorySparseAttention: one decoder layer's attention over a memory (paper, section 3.2, eq. 3-4).

Two streams, which meet in the memory alone:

* documents attend causally, each within itself; a routed layer also leaves the memory behind: K (after norm and RoPE),
  V and routing keys, mean-pooled over chunks. Projection commutes with the mean, so states are pooled first and C rows
  projected instead of T;
* active contexts attend to [template head; pooled chunks of the selected documents; themselves, causally]. A layer
  that does not route reads no document.

The invariant: a document's part of the memory depends on nothing but the document, so the memory can be encoded
elsewhere, kept, cut and changed. Encoding a pack, a bank and a single document is this same code.

Shapes: T document tokens, D documents, C chunks, A active-context tokens, Q queries, X routing tokens,
K selected documents, M model width, H query heads, G key/value heads, W head width, R = G * W.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from msa_train.kernels.choice import Kernels
from msa_train.kernels.elementwise import rms_norm
from msa_train.kernels.pool import pool_chunks
from msa_train.kernels.rope import norm_rotate
from msa_train.kernels.varlen import Sequences, varlen_attention
from msa_train.pack import ChunkLayout, Contexts, Documents, TensorFields
from msa_train.routing import document_scores, routing_key, routing_query, select_documents


@dataclass(frozen=True)
class LayerMemory(TensorFields):
    """What one routed layer keeps of the documents.

    Args:
        key_CGW: Mean of K over each chunk, after k-norm and RoPE.
        value_CGW: Mean of V over each chunk.
        router_key_CR: Unit routing keys k^ of each chunk, float32.
    """

    key_CGW: Tensor
    value_CGW: Tensor
    router_key_CR: Tensor


@dataclass(frozen=True)
class Reading:
    """What a routed layer chose.

    Args:
        doc_score_QD: Document scores, float32, with their gradient; -inf where a document is excluded.
        selected_QK: Selected documents, best first; -1 where there is none left.
    """

    doc_score_QD: Tensor
    selected_QK: Tensor


Found = TypeVar("Found")
Found_co = TypeVar("Found_co", covariant=True)


@dataclass(frozen=True)
class Chosen(Generic[Found_co]):
    """What a routed layer is to attend to.

    Args:
        key_CGW: Keys of chunks on the device, at least those of the selected documents.
        value_CGW: Their values.
        chunks: Layout of these rows.
        selected_QK: Selected documents of that layout; -1 where there is none left.
        found: What the choice is told as.
    """

    key_CGW: Tensor
    value_CGW: Tensor
    chunks: ChunkLayout
    selected_QK: Tensor
    found: Found_co


class RoutedMemory(Protocol[Found_co]):
    """The documents of one routed layer, wherever they are kept."""

    def choose(self, query_XR: Tensor, offsets_Q: Tensor, heads: int, top_k: int) -> Chosen[Found_co]:
        """Selects documents.

        Args:
            query_XR: q~ of the routing tokens, query after query, float32.
            offsets_Q: Where each query's tokens begin, Q + 1 values, int64.
            heads: H.
            top_k: Documents to select per query.
        """
        ...


@dataclass(frozen=True)
class PackMemory:
    """Documents that are all on the device: a pack's, or a short memory's.

    Args:
        memory: What the layer keeps of them.
        chunks: Their chunk layout.
        excluded_QD: Documents that a query must not select, bool.
        selected_QK: A selection to use instead of the best: recomputation hands back that of the first pass, since a
            tie that falls the other way would change the shapes.
    """

    memory: LayerMemory
    chunks: ChunkLayout
    excluded_QD: Tensor | None = None
    selected_QK: Tensor | None = None

    def choose(self, query_XR: Tensor, offsets_Q: Tensor, heads: int, top_k: int) -> Chosen[Reading]:
        """Selects the best of all, with their scores' gradient."""
        with torch.autocast(query_XR.device.type, enabled=False):
            score_QD = document_scores(query_XR, offsets_Q, self.memory.router_key_CR, self.chunks, heads)
        if self.excluded_QD is not None:
            score_QD = score_QD.masked_fill(self.excluded_QD, -torch.inf)
        selected_QK = select_documents(score_QD, top_k) if self.selected_QK is None else self.selected_QK
        reading = Reading(score_QD, selected_QK)
        return Chosen(self.memory.key_CGW, self.memory.value_CGW, self.chunks, selected_QK, reading)


@dataclass(frozen=True)
class LayerCache:
    """Keys and values that contexts attended to in one layer: each to [template head; chosen chunks; itself].

    Args:
        key_NGW: Keys: the head's, then context after context.
        value_NGW: Values.
        offsets: Where each of them begins: Q + 2 values, int32.
    """

    key_NGW: Tensor
    value_NGW: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class LayerStep:
    """Where contexts that go on find their keys and values in one layer.

    Args:
        key_NGW: Keys of all contexts that lie together, with room.
        value_NGW: Values.
        seen_N: Rows that the contexts attend to, the new tokens' included, context after context.
        new_A: Rows that take the new tokens' keys and values.
        sequences: What is whose among new tokens and `seen_N`.
    """

    key_NGW: Tensor
    value_NGW: Tensor
    seen_N: Tensor
    new_A: Tensor
    sequences: Sequences


@dataclass(frozen=True)
class Rope:
    """Rotary factors of a token stream: `cos` and `sin`, [tokens, W]."""

    cos: Tensor
    sin: Tensor


class MemorySparseAttention:
    """Reads and encodes with the projections of one Hugging Face attention module.

    Holds no parameters: they stay the decoder's own, under their own names, so that the backbone can be saved and
    opened without this library. Every weight is used through its module's call, which is where ZeRO-3 gathers it.

    Args:
        attention: Module with q_proj, k_proj, v_proj, o_proj, head_dim, and q_norm/k_norm where the decoder has them;
            a routed layer has router_q_proj and router_k_proj as well.
        top_k: Documents selected per query.
        kernels: Which implementations to run.
    """

    def __init__(self, attention: Any, top_k: int, kernels: Kernels = Kernels()) -> None:
        self.modules = attention
        self.width: int = self.modules.head_dim
        self.heads: int = self.modules.q_proj.out_features // self.width
        self.groups: int = self.modules.k_proj.out_features // self.width
        self.scale: float = getattr(attention, "scaling", self.width**-0.5)
        self.top_k = top_k
        self.use(kernels)

    def use(self, kernels: Kernels) -> None:
        """Changes which implementations run."""
        self.kernels = kernels
        for name in ("q_norm", "k_norm"):
            if (norm := getattr(self.modules, name, None)) is not None:
                # behind the module's own call, where ZeRO-3 gathers its weight
                norm.forward = partial(_head_norm, norm, kernels)

    @property
    def routed(self) -> bool:
        """Whether this layer reads the memory."""
        return hasattr(self.modules, "router_k_proj")

    def remember(
        self, hidden_TM: Tensor, rope: Rope, documents: Documents
    ) -> tuple[Tensor, Tensor, LayerMemory | None]:
        """Keys and values of the documents in this layer.

        Args:
            hidden_TM: Normed states of the document tokens.
            rope: Rotary factors of the document-wise positions.
            documents: Their layout.

        Returns:
            Keys and values of all tokens [T, G, W], and the memory (None unless the layer routes).
        """
        key, value = self._key_value(hidden_TM, rope)
        if not self.routed:
            return key, value, None
        pooled_CM, key_CGW, value_CGW = (
            pool_chunks(states, documents.chunk_offsets_C, self.kernels.pool) for states in (hidden_TM, key, value)
        )
        router_key = self.modules.router_k_proj(pooled_CM).unflatten(-1, (self.groups, self.width))
        return key, value, LayerMemory(key_CGW, value_CGW, routing_key(router_key))

    def attend(self, hidden_TM: Tensor, rope: Rope, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        """Documents, each within itself.

        Args:
            hidden_TM: As in `remember`.
            rope: As there.
            key: What that returned.
            value: Likewise.
            documents: As there.

        Returns:
            The attention output [T, M].
        """
        sequences = Sequences(documents.offsets_D, documents.offsets_D, documents.longest, documents.longest)
        return self._attend(self._query(hidden_TM, rope), key, value, sequences)

    def read(
        self,
        hidden_AM: Tensor,
        rope: Rope,
        contexts: Contexts,
        memory: RoutedMemory[Found] | None = None,
        top_k: int | None = None,
        caches: list[LayerCache] | None = None,
    ) -> tuple[Tensor, Found | None]:
        """Active contexts through this layer.

        Args:
            hidden_AM: Normed states of template head and contexts.
            rope: Rotary factors of their global positions.
            contexts: Their layout.
            memory: The documents; None where the layer does not route.
            top_k: Documents to select, where it differs from the layer's own.
            caches: Takes what the contexts attended to, one cache for all, so that `extend` can go on from there.

        Returns:
            The attention output [A, M] and, where the layer routes, what was found.
        """
        query = self._query(hidden_AM, rope)
        key, value = self._key_value(hidden_AM, rope)
        found, longest = None, contexts.head + contexts.longest
        if memory is None:
            rows, offsets = context_rows(contexts)
        else:
            query_XR = self._routing_query(hidden_AM, contexts)
            chosen = memory.choose(query_XR, contexts.routing_offsets_Q, self.heads, top_k or self.top_k)
            rows, offsets = context_rows(contexts, chosen.chunks, chosen.selected_QK)
            key = torch.cat([key, chosen.key_CGW.to(key.dtype)])
            value = torch.cat([value, chosen.value_CGW.to(value.dtype)])
            longest += chosen.chunks.largest_sums[chosen.selected_QK.shape[1]]
            found = chosen.found
        key, value = key.index_select(0, rows), value.index_select(0, rows)
        sequences = Sequences(contexts.offsets_Q, offsets, max(contexts.head, contexts.longest), longest)
        if caches is not None:
            caches.append(LayerCache(key, value, offsets))
        return self._attend(query, key, value, sequences), found

    def extend(self, hidden_AM: Tensor, rope: Rope, step: LayerStep) -> Tensor:
        """Further tokens of contexts that were read, through this layer. What is launched does not depend on how many
        contexts there are, and where their rows lie is the same work for all layers: `decoding.extend` has done it.

        Args:
            hidden_AM: Normed states of the new tokens, context after context.
            rope: Rotary factors of their global positions.
            step: Where all keys and values are; it takes the new tokens'.

        Returns:
            The attention output [A, M].
        """
        query = self._query(hidden_AM, rope)
        key, value = self._key_value(hidden_AM, rope)
        step.key_NGW.index_copy_(0, step.new_A, key)
        step.value_NGW.index_copy_(0, step.new_A, value)
        key, value = step.key_NGW.index_select(0, step.seen_N), step.value_NGW.index_select(0, step.seen_N)
        return self._attend(query, key, value, step.sequences)

    def _routing_query(self, hidden_AM: Tensor, contexts: Contexts) -> Tensor:
        projected = self.modules.router_q_proj(hidden_AM.index_select(0, contexts.routing_index_X))
        return routing_query(projected.unflatten(-1, (self.heads, self.width)), self.groups)

    def _query(self, hidden: Tensor, rope: Rope) -> Tensor:
        query = self.modules.q_proj(hidden).unflatten(-1, (self.heads, self.width))
        return self._turn("q_norm", query, rope).to(hidden.dtype)

    def _key_value(self, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        key = self.modules.k_proj(hidden).unflatten(-1, (self.groups, self.width))
        value = self.modules.v_proj(hidden).unflatten(-1, (self.groups, self.width))
        return self._turn("k_norm", key, rope), value

    def _turn(self, name: str, states_THW: Tensor, rope: Rope) -> Tensor:
        norm = getattr(self.modules, name, None)
        if norm is None:
            return norm_rotate(states_THW, rope.cos, rope.sin, backend=self.kernels.rope)
        return norm(states_THW, rope)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences) -> Tensor:
        # under autocast a norm with float32 weights hands back float32; the kernels want one dtype
        dtype = value.dtype
        out = varlen_attention(query.to(dtype), key.to(dtype), value, sequences, self.scale, self.kernels.attention)
        return self.modules.o_proj(out.flatten(1))


def _head_norm(norm: Any, kernels: Kernels, states: Tensor, rope: Rope | None = None) -> Tensor:
    weight, eps = norm.weight, norm.variance_epsilon
    if rope is None:  # transformers' own forward
        return rms_norm(states, weight, eps)
    return norm_rotate(states, rope.cos, rope.sin, weight, eps, kernels.rope)


def context_rows(
    contexts: Contexts, chunks: ChunkLayout | None = None, selected_QK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which rows of [active-context tokens; chunks] each sequence of the context stream attends to.

    The head attends to itself; context q to [head; chunks of its selected documents; itself]. Bottom-right causality
    then gives every token of a context the whole head, all its chunks, and its own past.

    With a head of 1 token, one context of 2, and chunks 0-1 of a selected document: rows [0 | 0, 3, 4, 1, 2].

    Returns:
        Rows [at least the sum of key lengths], int64: the bound is known on the host, so nothing waits for the device,
        and rows behind the last offset belong to nobody. Offsets: Q + 2 values, int32.
    """
    device = contexts.tokens_A.device
    queries, tokens, head = contexts.queries, contexts.tokens_A.numel(), contexts.head
    own_start = contexts.offsets_Q[1:-1].long()
    own_length = contexts.offsets_Q.diff()[1:].long()
    starts = [own_start.new_zeros(queries, 1)]
    lengths = [own_start.new_full((queries, 1), head)]
    bound = head + queries * head + (tokens - head)
    if chunks is not None and selected_QK is not None:
        taken_QK = selected_QK.clamp_min(0)
        first_QK = chunks.offsets_D[taken_QK]
        starts.append(tokens + first_QK)
        lengths.append((chunks.offsets_D[taken_QK + 1] - first_QK).masked_fill(selected_QK < 0, 0))
        bound += queries * chunks.largest_sums[selected_QK.shape[1]]
    starts.append(own_start[:, None])
    lengths.append(own_length[:, None])

    start_Y, length_QY = torch.cat(starts, 1).flatten(), torch.cat(lengths, 1)
    zero = start_Y.new_zeros(1)
    start_Y = torch.cat([zero, start_Y])
    length_Y = torch.cat([zero + head, length_QY.flatten()])
    end_Y = length_Y.cumsum(0)
    place = torch.arange(bound, device=device)
    segment = torch.searchsorted(end_Y, place, right=True).clamp_max(len(end_Y) - 1)
    rows = start_Y[segment] + place - (end_Y[segment] - length_Y[segment])
    rows = torch.where(place < end_Y[-1], rows, zero)
    key_length = torch.cat([zero + head, length_QY.sum(1)])
    offsets = torch.cat([zero, key_length.cumsum(0)]).to(torch.int32)
    return rows, offsets
