"""MemoryPack: the tensors of one training sample, laid out so that every step of the model is a slice.

All documents come first, end to end; then the active contexts, end to end, behind one template head that they share
(its states depend on nothing else, so one copy serves every query exactly). No batch dimension, no padding.
The invariant: everything about the structure is known here, on the host, before a device sees the pack, so no layer
asks the device for its own shape.

Shapes: T document tokens, D documents, C chunks, A active-context tokens (head included), Q queries, X routing tokens
of all queries, N labelled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class _Bytes:
    array: np.ndarray[Any, Any]


def _on_host(value: Any) -> bool:
    """Whether numpy can hold it; it has no bfloat16."""
    plain = isinstance(value, Tensor) and value.device.type == "cpu" and not value.requires_grad
    return plain and value.dtype != torch.bfloat16


class TensorFields:
    """Moves every tensor of a dataclass, nested ones too. Lightning and DataLoader find `to` and `pin_memory`.

    Between processes host tensors travel as bytes: torch would open a shared file for each of them, which costs more
    than copying (docs/data.md) and runs out of file descriptors with many workers.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {name: _Bytes(v.numpy()) if _on_host(v) else v for name, v in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():  # a frozen dataclass has no other way to be filled
            object.__setattr__(self, name, torch.from_numpy(value.array) if isinstance(value, _Bytes) else value)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        moved: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = change(value)
            elif isinstance(value, TensorFields):
                moved[field.name] = value._map(change)
        return replace(self, **moved)  # type: ignore[type-var]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked host memory."""
        return self._map(Tensor.pin_memory)


@dataclass(frozen=True)
class ChunkLayout(TensorFields):
    """Which chunks belong to which document.

    Args:
        document_C: The document of each chunk, int64.
        offsets_D: Chunks of document i are `offsets_D[i] .. offsets_D[i + 1]`; D + 1 values, int64.
        largest_sums: `largest_sums[k]` is the number of chunks of the k largest documents together. It bounds a
            selection's size on the host, so that gathering one needs no look at the device.
    """

    document_C: Tensor
    offsets_D: Tensor
    largest_sums: tuple[int, ...]

    @property
    def documents(self) -> int:
        """Number of documents D."""
        return len(self.largest_sums) - 1

    @staticmethod
    def of_counts(chunks_per_document: Sequence[int]) -> ChunkLayout:
        """Layout of documents with these many chunks each.

        >>> layout = ChunkLayout.of_counts([2, 1, 3])
        >>> layout.document_C.tolist(), layout.offsets_D.tolist(), layout.largest_sums
        ([0, 0, 1, 2, 2, 2], [0, 2, 3, 6], (0, 3, 5, 6))
        """
        count_D = torch.tensor(list(chunks_per_document), dtype=torch.int64)
        largest = torch.sort(count_D, descending=True).values.cumsum(0).tolist()
        return ChunkLayout(
            document_C=torch.repeat_interleave(torch.arange(len(count_D)), count_D),
            offsets_D=_offsets(count_D),
            largest_sums=(0, *largest),
        )


@dataclass(frozen=True)
class Documents(TensorFields):
    """Documents end to end.

    Args:
        tokens_T: Token ids, int64.
        position_T: RoPE positions, restarting at 0 in every document, int64.
        offsets_D: Cumulative lengths, D + 1 values, int32 (what varlen kernels take).
        chunk_offsets_C: Cumulative chunk lengths, C + 1 values, int64. A chunk never crosses documents.
        chunks: Which chunks belong to which document.
        lengths: Tokens of each document, known on the host.
    """

    tokens_T: Tensor
    position_T: Tensor
    offsets_D: Tensor
    chunk_offsets_C: Tensor
    chunks: ChunkLayout
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    def parts(self, budget: int, chunk_size: int) -> list[Documents]:
        """The same in order, at most `budget` tokens each (a longer document is a part of its own), without a copy.

        >>> whole = Documents.build([[7, 8, 9], [5], [4, 4]], chunk_size=2)
        >>> [part.tokens_T.tolist() for part in whole.parts(4, chunk_size=2)]
        [[7, 8, 9, 5], [4, 4]]
        >>> whole.parts(4, chunk_size=2)[1].chunk_offsets_C.tolist()
        [0, 2]
        """
        bounds, taken = [0], 0
        for number, length in enumerate(self.lengths):
            if taken and taken + length > budget:
                bounds.append(number)
                taken = 0
            taken += length
        bounds.append(len(self.lengths))
        return [self.part(first, last, chunk_size) for first, last in zip(bounds, bounds[1:], strict=False)]

    def part(self, first: int, last: int, chunk_size: int) -> Documents:
        """Documents `first .. last`, without a copy of their tokens."""
        chunks = [-(-length // chunk_size) for length in self.lengths]
        token, stop = sum(self.lengths[:first]), sum(self.lengths[:last])
        chunk, end = sum(chunks[:first]), sum(chunks[:last])
        return Documents(
            tokens_T=self.tokens_T[token:stop],
            position_T=self.position_T[token:stop],
            offsets_D=self.offsets_D[first : last + 1] - token,
            chunk_offsets_C=self.chunk_offsets_C[chunk : end + 1] - token,
            chunks=ChunkLayout(
                document_C=self.chunks.document_C[chunk:end] - first,
                offsets_D=self.chunks.offsets_D[first : last + 1] - chunk,
                largest_sums=(0, *accumulate(sorted(chunks[first:last], reverse=True))),
            ),
            lengths=self.lengths[first:last],
        )

    @staticmethod
    def build(documents: Sequence[Sequence[int]], chunk_size: int) -> Documents:
        """Lays documents out; each needs at least one token.

        >>> d = Documents.build([[7, 8, 9], [5]], chunk_size=2)
        >>> d.position_T.tolist(), d.offsets_D.tolist(), d.chunk_offsets_C.tolist()
        ([0, 1, 2, 0], [0, 3, 4], [0, 2, 3, 4])
        """
        assert documents and all(len(tokens) for tokens in documents), "a pack needs documents, none of them empty"
        length_D = torch.tensor([len(tokens) for tokens in documents])
        chunk_lengths = [
            min(chunk_size, len(tokens) - start) for tokens in documents for start in range(0, len(tokens), chunk_size)
        ]
        return Documents(
            tokens_T=torch.cat([torch.as_tensor(tokens, dtype=torch.int64) for tokens in documents]),
            position_T=torch.cat([torch.arange(len(tokens)) for tokens in documents]),
            offsets_D=_offsets(length_D).to(torch.int32),
            chunk_offsets_C=_offsets(torch.tensor(chunk_lengths)),
            chunks=ChunkLayout.of_counts([-(-len(tokens) // chunk_size) for tokens in documents]),
            lengths=tuple(length_D.tolist()),
        )


@dataclass(frozen=True)
class Context:
    """One active context before it is packed: everything after the template head.

    Args:
        tokens: Token ids of query, answer and what stands between.
        labelled: Whether each token is a target of the language-model loss.
        routing: Spans of tokens whose routing queries choose documents: the question, and what was retrieved so far.
    """

    tokens: Sequence[int]
    labelled: Sequence[bool]
    routing: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Contexts(TensorFields):
    """One template head and the active contexts of Q queries, end to end.

    Args:
        tokens_A: Token ids, int64; the first `head` of them are the template head.
        position_A: Position of each token behind the head's start, counted per context, int64. The model adds the
            paper's offset of top-k to all but the head.
        offsets_Q: Cumulative lengths of [head, context 0, ..., context Q-1]: Q + 2 values, int32.
        routing_index_X: Rows of `tokens_A` that route, query after query, int64.
        routing_offsets_Q: Where each query's rows begin in it, Q + 1 values, int64; every query has at least one.
        label_index_N: Rows whose next token is a label, int64.
        label_target_N: That next token, int64.
        label_query_N: The query that each label belongs to, int64.
        head: Tokens of the template head.
        longest: Tokens of the longest context, head not counted.
    """

    tokens_A: Tensor
    position_A: Tensor
    offsets_Q: Tensor
    routing_index_X: Tensor
    routing_offsets_Q: Tensor
    label_index_N: Tensor
    label_target_N: Tensor
    label_query_N: Tensor
    head: int
    longest: int

    @property
    def queries(self) -> int:
        """Number of queries Q."""
        return self.routing_offsets_Q.shape[0] - 1

    def part(self, first: int, last: int) -> Contexts:
        """Contexts `first .. last` behind the same head; on the host alone, for its tensors are looked at.

        >>> told = Context([5, 6, 7], labelled=[False, False, True], routing=[(0, 2)])
        >>> c = Contexts.build([1, 2], [told, Context([8, 9], [False, True], [(0, 1)])]).part(1, 2)
        >>> c.tokens_A.tolist(), c.offsets_Q.tolist(), c.routing_index_X.tolist(), c.longest
        ([1, 2, 8, 9], [0, 2, 4], [2], 2)
        >>> c.label_index_N.tolist(), c.label_target_N.tolist(), c.label_query_N.tolist()
        ([2], [9], [0])
        """
        start, stop = self.offsets_Q[[first + 1, last + 1]].tolist()
        route, end = self.routing_offsets_Q[[first, last]].tolist()
        moved = start - self.head  # how far its rows move up
        labels = (self.label_query_N >= first) & (self.label_query_N < last)
        return Contexts(
            tokens_A=torch.cat([self.tokens_A[: self.head], self.tokens_A[start:stop]]),
            position_A=torch.cat([self.position_A[: self.head], self.position_A[start:stop]]),
            offsets_Q=torch.cat([self.offsets_Q[:1], self.offsets_Q[first + 1 : last + 2] - moved]),
            routing_index_X=self.routing_index_X[route:end] - moved,
            routing_offsets_Q=self.routing_offsets_Q[first : last + 1] - route,
            label_index_N=self.label_index_N[labels] - moved,
            label_target_N=self.label_target_N[labels],
            label_query_N=self.label_query_N[labels] - first,
            head=self.head,
            longest=int(self.offsets_Q[first + 1 : last + 2].diff().max()),
        )

    @staticmethod
    def build(head: Sequence[int], contexts: Sequence[Context]) -> Contexts:
        """Lays out contexts behind their template head.

        >>> answered = Context([5, 6, 7], labelled=[False, False, True], routing=[(0, 2)])
        >>> c = Contexts.build([1, 2], [answered, Context([8], [False], [(0, 1)])])
        >>> c.offsets_Q.tolist(), c.position_A.tolist(), c.routing_index_X.tolist(), c.routing_offsets_Q.tolist()
        ([0, 2, 5, 6], [0, 1, 2, 3, 4, 2], [2, 3, 5], [0, 2, 3])
        >>> c.label_index_N.tolist(), c.label_target_N.tolist()
        ([3], [7])
        """
        assert head and contexts, "a pack needs a template head and at least one query"
        tokens: list[int] = list(head)
        position: list[int] = list(range(len(head)))
        index, target, query, routing = [], [], [], []
        for number, context in enumerate(contexts):
            start = len(tokens)
            spans = [range(start + first, start + last) for first, last in context.routing]
            assert spans and all(start <= span[0] <= span[-1] < start + len(context.tokens) for span in spans)
            assert len(context.labelled) == len(context.tokens) and not context.labelled[0]
            routing.append([row for span in spans for row in span])
            for place, is_label in enumerate(context.labelled):
                if is_label:
                    index.append(start + place - 1)
                    target.append(context.tokens[place])
                    query.append(number)
            tokens.extend(context.tokens)
            position.extend(range(len(head), len(head) + len(context.tokens)))
        lengths = [len(head), *(len(context.tokens) for context in contexts)]
        return Contexts(
            tokens_A=torch.tensor(tokens),
            position_A=torch.tensor(position),
            offsets_Q=_offsets(torch.tensor(lengths)).to(torch.int32),
            routing_index_X=torch.tensor([row for rows in routing for row in rows]),
            routing_offsets_Q=_offsets(torch.tensor([len(rows) for rows in routing])),
            label_index_N=torch.tensor(index, dtype=torch.int64),
            label_target_N=torch.tensor(target, dtype=torch.int64),
            label_query_N=torch.tensor(query, dtype=torch.int64),
            head=len(head),
            longest=max(lengths[1:]),
        )


@dataclass(frozen=True)
class Shares(TensorFields):
    """What a rank knows of a pack that it shares with others (sharing.py).

    Args:
        chunks: Layout of all documents, those of the first rank first.
        chunk_counts: Chunks of each rank's documents.
        rank: Which of these ranks this is.
        tokens: Tokens of documents and contexts of the whole pack.
        queries: Queries of the whole pack.
    """

    chunks: ChunkLayout
    chunk_counts: tuple[int, ...]
    rank: int
    tokens: int
    queries: int

    @property
    def ranks(self) -> int:
        """How many share the pack."""
        return len(self.chunk_counts)


@dataclass(frozen=True)
class MemoryPack(TensorFields):
    """Documents and the queries that share them.

    D are the documents that are read: those of all ranks, where ranks share a pack.

    Args:
        documents: The memory; of a shared pack, what this rank encodes of it.
        contexts: The active contexts.
        positive_QD: Which documents a query is to find, bool.
        excluded_QD: Which documents are neither right nor wrong for a query, bool: known to be relevant but not asked
            for now (another step of its evidence chain, another part of a long document). They are not selected, not
            ranked and in no loss. All of them for an instruction, which reads no document.
            An unmarked document is a negative.
        document_ids: Name of every document that is read, in order.
        query_ids: Name of every query, in order.
        asked: Queries with a positive, a number known on the host.
        query_steps: Retrieval step that every query is at, from 0.
        index: Place in the global order of packs.
        step_labels: Labelled tokens of the whole optimiser step that the pack belongs to: over all ranks and all
            accumulated packs. The loss divides by it.
        step_queries: Queries with a positive of that step, likewise.
        counted: False for a repeat that only keeps ranks in step in an evaluation; metrics leave it out.
        shares: What the other ranks encode, where several share the pack.
    """

    documents: Documents
    contexts: Contexts
    positive_QD: Tensor
    excluded_QD: Tensor
    document_ids: tuple[str, ...]
    query_ids: tuple[str, ...]
    asked: int
    query_steps: tuple[int, ...] = ()
    index: int = 0
    step_labels: int = 0
    step_queries: int = 0
    counted: bool = True
    shares: Shares | None = None

    def describe(self) -> str:
        """Its sizes in words, without a look at the device."""
        lengths = self.documents.lengths
        return (
            f"pack {self.index}: {len(lengths)} documents, {sum(lengths):,} tokens, the longest {max(lengths):,}; "
            f"{len(self.query_ids)} queries"
        )

    def check_counts(self) -> None:
        """Holds the step's counts against the pack's own: a loss is divided by them.

        Raises:
            ValueError: The step has fewer labels or queries than the pack, so they were not set.
        """
        for name, step, own in (
            ("step_labels", self.step_labels, len(self.contexts.label_target_N)),
            ("step_queries", self.step_queries, self.asked),
        ):
            if step < own:
                raise ValueError(f"{name} is {step}, but pack {self.index} alone has {own}: set it to the step's count")

    def __post_init__(self) -> None:
        if self.shares is not None:
            counts, own = self.shares.chunk_counts, self.documents.chunks.largest_sums[-1]
            if counts[self.shares.rank] != own or sum(counts) != self.shares.chunks.largest_sums[-1]:
                raise ValueError(
                    f"the shares have {counts} of {self.shares.chunks.largest_sums[-1]} chunks, but rank "
                    f"{self.shares.rank} has {own}"
                )
        expected = (self.contexts.queries, self.chunks.documents)
        for name, mask_QD in (("positive_QD", self.positive_QD), ("excluded_QD", self.excluded_QD)):
            if tuple(mask_QD.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(mask_QD.shape)}, the pack has (Q, D) = {expected}")

    @property
    def queries(self) -> int:
        """Number of queries Q."""
        return self.contexts.queries

    @property
    def chunks(self) -> ChunkLayout:
        """Layout of all documents that are read."""
        return self.documents.chunks if self.shares is None else self.shares.chunks

    @property
    def tokens(self) -> int:
        """Tokens of documents and contexts together."""
        return self.documents.tokens_T.numel() + self.contexts.tokens_A.numel()


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
