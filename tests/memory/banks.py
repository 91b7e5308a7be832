"""What a bank holds and finds, laid open, so that two banks can be compared in all of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msa_train.kernels.maxsim import Precision, RoutingKeys
from msa_train.memory import Encoder, MemoryBank, Passage
from msa_train.search import Found

HEADS, K = 4, 5
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Held:
    """All that a bank keeps of a document."""

    id: str
    source: str
    text: str
    tokens: int
    tensors: tuple[Tensor, ...]  # of every layer: routing keys, their scale, pooled keys, values


def contents(bank: MemoryBank) -> dict[int, Held]:
    """Every document by its number."""
    held = {}
    for segment in bank.segments:
        for row in segment.live_D.nonzero().flatten().tolist():
            first, last = segment.chunk_offsets_D[row : row + 2].tolist()
            tensors: list[Tensor] = []
            for layer in segment.layers:
                keys = layer.keys.rows(first, last)
                scale = torch.empty(0) if keys.scale_C is None else keys.scale_C
                tensors += [keys.vector_CR, scale, layer.key_CGW[first:last].cpu(), layer.value_CGW[first:last].cpu()]
            number = int(segment.number_D[row])
            assert number not in held
            tokens = int(segment.tokens_D[row])
            held[number] = Held(segment.ids[row], segment.source(row), segment.texts[row], tokens, tuple(tensors))
    return held


def assert_same_contents(found: MemoryBank, wanted: MemoryBank) -> None:
    """Bitwise."""
    left, right = contents(found), contents(wanted)
    assert left.keys() == right.keys()
    for number in left:
        mine, theirs = left[number], right[number]
        assert replace(mine, tensors=()) == replace(theirs, tensors=())
        assert len(mine.tensors) == len(theirs.tensors) > 0
        for one, other in zip(mine.tensors, theirs.tensors, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), number


def queries(bank: MemoryBank, lengths: Sequence[int] = (3, 1, 4), seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Routing queries of every layer, and where each query's begin."""
    width, generator = bank.shape.groups * bank.shape.width, torch.Generator().manual_seed(seed)
    drawn = [torch.randn(sum(lengths), width, generator=generator).to(bank.device) for _ in bank.shape.layers]
    return drawn, torch.tensor([0, *lengths]).cumsum(0).to(bank.device)


def assert_same_found(found: Found, wanted: Found) -> None:
    """The same documents in the same order; a score is a sum, whose order is the matrix product's."""
    assert torch.equal(found.number_QK.cpu(), wanted.number_QK.cpu())
    torch.testing.assert_close(found.score_QK.cpu(), wanted.score_QK.cpu(), atol=1e-6, rtol=1e-6)


def assert_same_answers(found: MemoryBank, wanted: MemoryBank, seed: int = 0) -> None:
    """Search, ranking and reading, all documents of each."""
    assert len(found) == len(wanted) and found.numbers() == wanted.numbers()
    assert (found.chunks, found.tokens) == (wanted.chunks, wanted.tokens)
    asked = found.numbers()
    for number in asked:
        assert number in found and found.id(number) == wanted.id(number) and found.text(number) == wanted.text(number)
        assert found.number(found.id(number)) == number and found.source(number) == wanted.source(number)
    query_LXR, offsets_Q = queries(wanted, seed=seed)
    mine, mine_Q = [query_XR.to(found.device) for query_XR in query_LXR], offsets_Q.to(found.device)
    excluded = [asked[:2], [], asked[1::2]]
    for layer, query_XR in enumerate(query_LXR):
        assert_same_found(
            found.search(layer, mine[layer], mine_Q, HEADS, K), wanted.search(layer, query_XR, offsets_Q, HEADS, K)
        )
        counts, *rows = found.read(layer, asked[::-1])
        wanted_counts, *wanted_rows = wanted.read(layer, asked[::-1])
        assert counts == wanted_counts and sum(counts) == wanted.chunks
        assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(rows, wanted_rows, strict=True))
    weights = [float(2 + layer) for layer in range(len(query_LXR))]
    for among in (None, asked[::3]):
        assert_same_found(
            found.rank(mine, mine_Q, weights, HEADS, K, excluded, among),
            wanted.rank(query_LXR, offsets_Q, weights, HEADS, K, excluded, among),
        )


def assert_same(found: MemoryBank, wanted: MemoryBank) -> None:
    """Contents bitwise, and answers."""
    assert_same_contents(found, wanted)
    assert_same_answers(found, wanted)


def slow_search(bank: MemoryBank, layer: int, query_XR: Tensor, offsets_Q: Tensor, k: int) -> Found:
    """A loop over documents and queries, from their stored keys alone."""
    if bank.shape.precision != "float32":
        query_XR = query_XR.bfloat16().float()
    scores = []
    for number, held in sorted(contents(bank).items()):
        vector_CR, scale_C = held.tensors[4 * layer : 4 * layer + 2]
        key_CR = RoutingKeys(vector_CR, scale_C if len(scale_C) else None).floats()
        score_XC = query_XR @ key_CR.T / HEADS
        scores.append([number, *(float(score_XC[a:b].max()) for a, b in zip(offsets_Q, offsets_Q[1:], strict=False))])
    numbers, rows = [], []
    for query in range(1, len(offsets_Q)):
        best = sorted(scores, key=lambda row: (-row[query], row[0]))[:k]
        numbers.append([int(row[0]) for row in best] + [-1] * (k - len(best)))
        rows.append([row[query] for row in best] + [-torch.inf] * (k - len(best)))
    return Found(torch.tensor(numbers), torch.tensor(rows))


def encoded_anew(encoder: Encoder, numbered: Iterable[tuple[int, Passage]], precision: Precision) -> MemoryBank:
    """A bank of these documents under these numbers, encoded in one go."""
    bank = MemoryBank(replace(encoder.shape, precision=precision))
    bank.add(encoder.encode(sorted(numbered, key=lambda pair: pair[0]), precision))
    return bank
