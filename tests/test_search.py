"""Search against a loop over whole numbers, on which nothing rounds, so that ties are ties in every precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from msa_train.errors import UserError
from msa_train.kernels.maxsim import Precision, RoutingKeys
from msa_train.pack import ChunkLayout
from msa_train.routing import document_scores, select_documents
from msa_train.search import BLOCK, Found, Tile, rank, search

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
HEADS, LARGEST = 4, 2**32 - 2
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")


@dataclass(frozen=True)
class Doc:
    """A document of the slow reference: its number, its chunks' keys in each layer, whether it is still there."""

    number: int
    key_LCR: Tensor
    live: bool = True


def draw_documents(counts: Sequence[int], seed: int, width: int = 3, layers: int = 1, dead: float = 0.2) -> list[Doc]:
    """Documents with keys of -1, 0 and 1, in the order of their numbers."""
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.randint(1, 50, (len(counts),), generator=generator).cumsum(0).tolist()
    live = (torch.rand(len(counts), generator=generator) >= dead).tolist()
    keys = [torch.randint(-1, 2, (layers, count, width), generator=generator).float() for count in counts]
    return [Doc(*row) for row in zip(gaps, keys, live, strict=True)]


def tile_of(documents: Sequence[Doc], precision: Precision = "float32", layer: int = 0) -> Tile:
    """A tile, numbers ascending."""
    documents = sorted(documents, key=lambda document: document.number)
    counts = torch.tensor([document.key_LCR.shape[1] for document in documents])
    live_D = torch.tensor([document.live for document in documents])
    return Tile(
        RoutingKeys.of(torch.cat([document.key_LCR[layer] for document in documents]), precision),
        torch.repeat_interleave(torch.arange(len(documents)), counts),
        torch.tensor([document.number for document in documents]),
        None if bool(live_D.all()) else live_D,
    )


def cut(documents: Sequence[Doc], size: int, layer: int = 0) -> Iterator[Tile]:
    """Tiles of `size` documents, made as they are asked for."""
    for start in range(0, len(documents), size):
        yield tile_of(documents[start : start + size], layer=layer)


def draw_queries(lengths: Sequence[int], seed: int, width: int = 3) -> tuple[Tensor, Tensor]:
    """Routing tokens of whole numbers, and their offsets."""
    query_XR = torch.randint(-2, 3, (sum(lengths), width), generator=torch.Generator().manual_seed(seed)).float()
    return query_XR, torch.tensor([0, *lengths]).cumsum(0)


def brute_force(
    documents: Sequence[Doc],
    query_LXR: Sequence[Tensor],
    offsets_Q: Tensor,
    weights: Sequence[float],
    k: int,
    excluded: Sequence[Sequence[int]] | None = None,
) -> list[list[tuple[int, float]]]:
    """Numbers and scores, one product at a time."""
    found = []
    for query, (first, stop) in enumerate(zip(offsets_Q.tolist(), offsets_Q.tolist()[1:], strict=False)):
        rows = []
        for document in documents:
            if not document.live or (excluded and document.number in excluded[query]):
                continue
            scores = [
                max(float(query_XR[x] @ key) / HEADS for x in range(first, stop) for key in key_CR)
                for query_XR, key_CR in zip(query_LXR, document.key_LCR, strict=True)
            ]
            mean = sum(weight * score for weight, score in zip(weights, scores, strict=True)) / sum(weights)
            rows.append((-mean, document.number))
        best = [(number, -score) for score, number in sorted(rows)[:k]]
        found.append(best + [(-1, -math.inf)] * (k - len(best)))
    return found


def listed(found: Found) -> list[list[tuple[int, float]]]:
    assert found.number_QK.dtype == torch.int64 and found.score_QK.dtype == torch.float32
    pairs = zip(found.number_QK.tolist(), found.score_QK.tolist(), strict=True)
    return [list(zip(numbers, scores, strict=True)) for numbers, scores in pairs]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=11),
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    k=st.integers(1, 6),
    seed=st.integers(0, 999),
    precision=st.sampled_from(PRECISIONS),
    data=st.data(),
)
def test_search_equals_brute_force_however_the_bank_is_cut(
    counts: list[int], lengths: list[int], k: int, seed: int, precision: Precision, data: st.DataObject
) -> None:
    documents = draw_documents(counts, seed)
    query_XR, offsets_Q = draw_queries(lengths, seed)
    tile_of_document = data.draw(st.lists(st.integers(0, 3), min_size=len(counts), max_size=len(counts)))
    numbers = st.sampled_from([*(document.number for document in documents), LARGEST])
    excluded = data.draw(
        st.none() | st.lists(st.lists(numbers, max_size=3), min_size=len(lengths), max_size=len(lengths))
    )
    parts = [[d for d, tile in zip(documents, tile_of_document, strict=True) if tile == part] for part in (2, 0, 3, 1)]
    tiles = [tile_of(part, precision) for part in parts if part]
    wanted = brute_force(documents, [query_XR], offsets_Q, [1.0], k, excluded)
    assert listed(search(iter(tiles), query_XR, offsets_Q, HEADS, k, excluded)) == wanted


def test_tiles_of_any_size_find_what_one_tile_finds() -> None:
    documents = draw_documents([1, 3, 2, 5, 1, 1, 4, 2, 3], seed=5)
    query_XR, offsets_Q = draw_queries([2, 4, 1], seed=6)
    whole = listed(search([tile_of(documents)], query_XR, offsets_Q, HEADS, k=4))
    assert whole == brute_force(documents, [query_XR], offsets_Q, [1.0], 4)
    for size in range(1, 9):
        assert listed(search(cut(documents, size), query_XR, offsets_Q, HEADS, k=4)) == whole


def test_equal_scores_go_to_the_lower_number_whatever_tile_comes_first() -> None:
    key = torch.ones(1, 1, 3)
    parts = [[Doc(7, key), Doc(LARGEST, key)], [Doc(1, key)], [Doc(3, key), Doc(2**31, key)], [Doc(2**31 - 1, key)]]
    orders = list(itertools.permutations(map(tile_of, parts)))
    for tiles in orders:
        found = search(tiles, torch.tensor([[-1.0, 0, 0]]), torch.tensor([0, 1]), HEADS, k=5)
        assert found.number_QK.tolist() == [[1, 3, 7, 2**31 - 1, 2**31]]
        assert found.score_QK.tolist() == [[-0.25] * 5]
    assert len(orders) == 24


def test_minus_zero_is_zero() -> None:
    tile = tile_of([Doc(4, torch.zeros(1, 1, 2)), Doc(9, -torch.zeros(1, 1, 2)), Doc(5, -torch.ones(1, 1, 2))])
    assert str(float(tile.keys.vector_CR[2, 0])) == "-0.0"
    found = search([tile], torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1]), heads=1, k=3)
    assert found.number_QK.tolist() == [[4, 9, 5]]


def test_the_best_of_many_blocks_of_documents() -> None:
    """More blocks than are looked into, hundreds of ties between and within them, and a last block that is not full."""
    count, k = 7 * BLOCK + 13, 3
    documents = draw_documents([1 + i % 3 for i in range(count)], seed=1, width=2, dead=0.5)
    query_XR, offsets_Q = draw_queries([1, 2], seed=2, width=2)
    wanted = brute_force(documents, [query_XR], offsets_Q, [1.0], k)
    assert listed(search([tile_of(documents)], query_XR, offsets_Q, HEADS, k)) == wanted


def test_the_best_are_found_each_in_a_block_of_its_own() -> None:
    """The worst of them in the last, which is not full; then in the first, the fourth and the seventh."""
    documents = draw_documents([1] * (7 * BLOCK + 13), seed=1, width=2, dead=0.0)
    places = [7 * BLOCK + 12, 5, 3 * BLOCK, 7 * BLOCK - 1]
    for height, place in enumerate(places):
        documents[place] = Doc(documents[place].number, torch.tensor([[[9.0 + height, 0]]]))
    for k in (1, 3, 4):
        found = search([tile_of(documents)], torch.tensor([[1.0, 1]]), torch.tensor([0, 1]), 1, k)
        assert found.number_QK.tolist() == [[documents[place].number for place in places[::-1][:k]]]
        assert found.score_QK.tolist() == [[12.0, 11, 10, 9][:k]]


def test_nothing_absent_beats_an_all_negative_score() -> None:
    keys = torch.ones(1, 2, 3)
    documents = [Doc(11, keys), Doc(12, keys, live=False), Doc(15, keys), Doc(16, keys)]
    query_XR, offsets_Q = -torch.ones(3, 3), torch.tensor([0, 1, 3])
    found = search([tile_of(documents)], query_XR, offsets_Q, HEADS, k=4, excluded=[[15], []])
    assert found.number_QK.tolist() == [[11, 16, -1, -1], [11, 15, 16, -1]]
    assert found.score_QK.tolist() == [[-0.75, -0.75, -math.inf, -math.inf], [-0.75, -0.75, -0.75, -math.inf]]


def test_an_empty_bank_finds_nothing() -> None:
    query_XR, offsets_Q = draw_queries([2, 1], seed=0)
    none = Tile(RoutingKeys(torch.zeros(0, 3)), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    gone = tile_of([Doc(5, torch.ones(1, 2, 3), live=False)])
    for tiles, excluded in itertools.product(([], [none], [none, gone, none]), (None, [[5, 6], []])):
        found = search(tiles, query_XR, offsets_Q, HEADS, 3, excluded)
        assert found.number_QK.tolist() == [[-1] * 3] * 2 and bool(found.score_QK.isneginf().all())


def test_float32_keys_select_exactly_as_routing_does() -> None:
    generator = torch.Generator().manual_seed(3)
    counts = [1 + i % 4 for i in range(300)]
    layout = ChunkLayout.of_counts(counts)
    key_CR = torch.randn(sum(counts), 20, generator=generator)
    query_XR, offsets_Q = torch.randn(9, 20, generator=generator), torch.tensor([0, 4, 5, 9])
    score_QD = document_scores(query_XR, offsets_Q, key_CR, layout, HEADS)
    number_D = 3 * torch.arange(300) + 8
    tile = Tile(RoutingKeys.of(key_CR, "float32"), layout.document_C, number_D)
    found = search([tile], query_XR, offsets_Q, HEADS, k=16)
    selected_QK = select_documents(score_QD, 16)
    assert torch.equal(found.number_QK, number_D[selected_QK])
    assert torch.equal(found.score_QK, score_QD.gather(1, selected_QK))


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=8),
    weights=st.sampled_from([(1.0, 1.0, 2.0), (0.0, 3.0, 1.0), (0.5, 0.0, 0.0)]),
    size=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_rank_equals_brute_force_over_layers(
    counts: list[int], weights: tuple[float, ...], size: int, seed: int
) -> None:
    documents = draw_documents(counts, seed, layers=3)
    queries = [draw_queries([2, 1], seed + layer) for layer in range(3)]
    query_LXR, offsets_Q = [query for query, _ in queries], queries[0][1]
    excluded = [[documents[0].number], []]
    tiles = [cut(documents, size, layer) for layer in range(3)]
    wanted = brute_force(documents, query_LXR, offsets_Q, weights, 4, excluded)
    assert listed(rank(tiles, query_LXR, offsets_Q, weights, HEADS, 4, excluded)) == wanted


def test_layers_take_turns() -> None:
    asked: list[tuple[str, int]] = []

    def tiles(name: str) -> Iterator[Tile]:
        for place in range(3):
            asked.append((name, place))
            yield tile_of([Doc(place + 1, torch.ones(1, 2, 3))])

    query_XR, offsets_Q = draw_queries([2], seed=0)
    rank([tiles("a"), tiles("b")], [query_XR] * 2, offsets_Q, [1, 1], HEADS, 2)
    assert asked == [(name, place) for place in range(3) for name in "ab"]


def test_layers_cut_differently_are_refused() -> None:
    documents = draw_documents([1, 2, 1], seed=0, layers=2)
    query_XR, offsets_Q = draw_queries([2], seed=0)
    whole, parts = [tile_of(documents)], [tile_of(documents[:1]), tile_of(documents[1:])]
    for pair in ((whole, parts), (parts, whole), (parts, parts[:1]), (parts[:1], parts)):
        with pytest.raises(AssertionError, match="cut alike"):
            rank(pair, [query_XR] * 2, offsets_Q, [1, 1], HEADS, 2)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -0.5), (1.0, math.nan), (math.inf, 1.0)])
def test_weights_without_a_mean_are_refused(weights: tuple[float, float]) -> None:
    query_XR, offsets_Q = draw_queries([2], seed=0)
    with pytest.raises(UserError, match="layer weights"):
        rank([[], []], [query_XR] * 2, offsets_Q, weights, HEADS, 2)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_memory_does_not_grow_with_the_bank() -> None:
    documents = draw_documents([1, 2, 3, 4, 1], seed=0, width=16)
    query_XR, offsets_Q = draw_queries([3, 2], seed=0, width=16)
    tile = tile_of(documents, "int8")
    most = {}
    for count in (1, 2, 40):
        with Largest() as largest:
            search(itertools.repeat(tile, count), query_XR, offsets_Q, HEADS, k=3)
        most[count] = largest.elements
    assert most[40] == most[2] == most[1] > 0


small_keys = pytest.mark.parametrize("precision", ["bfloat16", "int8"])


@needs_cuda
@small_keys
@pytest.mark.parametrize(("lengths", "width"), [([64], 128), ([3, 140, 17], 1024)])
def test_the_kernel_finds_what_the_reference_finds(precision: Precision, lengths: list[int], width: int) -> None:
    documents = draw_documents([1 + i % 5 for i in range(9 * BLOCK + 5)], seed=4, width=width)
    query_XR, offsets_Q = (tensor.cuda() for tensor in draw_queries(lengths, seed=5, width=width))
    parts = [tile_of(documents[:777], precision), tile_of(documents[777:], precision)]
    excluded = [[documents[number].number] for number in range(len(lengths))]
    results = [
        listed(search([t.to("cuda") for t in tiles], query_XR, offsets_Q, HEADS, 16, excluded, backend))
        for tiles in (parts, parts[::-1], [tile_of(documents, precision)])
        for backend in ("triton", "torch")
    ]
    assert all(result == results[0] for result in results)
    on_cpu = search(parts, query_XR.cpu(), offsets_Q.cpu(), HEADS, 16, excluded)
    assert listed(on_cpu) == results[0] and results[0][0][0][0] > 0


@needs_cuda
@small_keys
def test_a_search_never_makes_the_host_wait(precision: Precision) -> None:
    documents = draw_documents([1 + i % 3 for i in range(3 * BLOCK)], seed=4, width=64, layers=2)
    query_XR, offsets_Q = (tensor.cuda() for tensor in draw_queries([5, 9], seed=5, width=64))
    tiles = [
        [tile_of(part, precision, layer).to("cuda") for part in (documents[:99], documents[99:])] for layer in (0, 1)
    ]

    def both() -> tuple[Found, Found]:
        excluded = [[documents[0].number], []]
        one = search(tiles[0], query_XR, offsets_Q, HEADS, 4, excluded)
        return one, rank(tiles, [query_XR, query_XR], offsets_Q, [1, 2], HEADS, 4, excluded)

    wanted = [listed(found) for found in both()]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [listed(each) for each in found] == wanted
