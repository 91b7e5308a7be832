"""Scores of chunks: every precision and back end against a loop; what is stored, against a bound worked by hand."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msa_train import routing
from msa_train.errors import UserError
from msa_train.kernels.maxsim import Precision, RoutingKeys, chunk_scores, document_ordinals, ordinals, scores
from msa_train.pack import ChunkLayout

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
HEADS = 6
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")


def drawn(lengths: list[int], chunks: int, width: int, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of these many tokens, their offsets, and keys of unit vectors per group."""
    generator = torch.Generator().manual_seed(chunks)
    query_XR = 2 * torch.randn(sum(lengths), width, generator=generator)
    key_CR = F.normalize(torch.randn(chunks, groups, width // groups, generator=generator), dim=-1).flatten(1)
    return query_XR, torch.tensor([0, *lengths]).cumsum(0), key_CR


def whole_numbers(
    lengths: list[int], chunks: int, width: int, precision: Precision
) -> tuple[Tensor, Tensor, RoutingKeys]:
    """The same with small whole numbers, on which no order of a sum rounds, and scales that are powers of two."""
    generator = torch.Generator().manual_seed(width)
    query_XR = torch.randint(-4, 5, (sum(lengths), width), generator=generator).float()
    vector_CR = torch.randint(-3, 4, (chunks, width), generator=generator)
    offsets_Q = torch.tensor([0, *lengths]).cumsum(0)
    if precision == "int8":
        scale_C = 2.0 ** torch.randint(-2, 3, (chunks,), generator=generator)
        return query_XR, offsets_Q, RoutingKeys(vector_CR.to(torch.int8), scale_C)
    return query_XR, offsets_Q, RoutingKeys.of(vector_CR.float(), precision)


def loop(query_XR: Tensor, offsets_Q: Tensor, keys: RoutingKeys, heads: int) -> Tensor:
    """One product at a time, in double precision, of the vectors as they are stored."""
    vector_CR = keys.vector_CR.double()
    scales = [1.0] * len(keys) if keys.scale_C is None else keys.scale_C.tolist()
    query_XR = query_XR if keys.precision == "float32" else query_XR.bfloat16()
    spans = list(zip(offsets_Q.tolist(), offsets_Q.tolist()[1:], strict=False))
    rows = [
        [
            max(float(query_XR[x].double() @ vector_CR[c]) * scales[c] / heads for x in range(*span))
            for c in range(len(keys))
        ]
        for span in spans
    ]
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scores_equal_a_loop(precision: Precision) -> None:
    query_XR, offsets_Q, key_CR = drawn([3, 1, 5], chunks=7, width=22)
    keys = RoutingKeys.of(key_CR, precision)
    scores_QC = chunk_scores(query_XR, offsets_Q, keys, HEADS)
    assert scores_QC.shape == (3, 7) and scores_QC.dtype == torch.float32
    torch.testing.assert_close(scores_QC, loop(query_XR, offsets_Q, keys, HEADS), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_negative_scores_stay_negative(precision: Precision) -> None:
    keys = RoutingKeys.of(torch.ones(5, 4), precision)
    scores_QC = chunk_scores(-torch.ones(3, 4), torch.tensor([0, 1, 3]), keys, heads=4)
    torch.testing.assert_close(scores_QC, -torch.ones(2, 5))


def test_float32_keys_score_exactly_as_routing_does() -> None:
    query_XR, offsets_Q, key_CR = drawn([4, 9, 2], chunks=31, width=40)
    scores_QC = chunk_scores(query_XR, offsets_Q, RoutingKeys.of(key_CR, "float32"), HEADS)
    layout = ChunkLayout.of_counts([1] * 31)
    assert torch.equal(scores_QC, routing.document_scores(query_XR, offsets_Q, key_CR, layout, HEADS))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_document_scores_as_its_best_chunk(precision: Precision) -> None:
    """Chunks of a document in any order; document 2 has none."""
    query_XR, offsets_Q, key_CR = drawn([3, 1], chunks=7, width=16)
    keys, owner = RoutingKeys.of(key_CR, precision), [0, 3, 1, 3, 0, 1, 0]
    scores_QC = chunk_scores(query_XR, offsets_Q, keys, HEADS)
    scores_QD = scores(document_ordinals(query_XR, offsets_Q, keys, torch.tensor(owner), 4, HEADS))
    for query, document in itertools.product(range(2), range(4)):
        own = [float(scores_QC[query, chunk]) for chunk in range(7) if owner[chunk] == document]
        assert float(scores_QD[query, document]) == max(own, default=-math.inf)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9))
def test_ordinals_sort_as_scores_do(values: list[float]) -> None:
    score = torch.tensor([*values, 0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf])
    ordinal = ordinals(score)
    assert torch.equal(scores(ordinal), score)
    assert torch.equal(ordinal[:, None] < ordinal, score[:, None] < score)
    assert torch.equal(ordinal[:, None] == ordinal, score[:, None] == score)


def test_autocast_changes_nothing() -> None:
    query_XR, offsets_Q, key_CR = drawn([4, 9], chunks=12, width=32)
    keys = RoutingKeys.of(key_CR, "float32")
    with torch.autocast("cpu", torch.bfloat16):
        inside_QC = chunk_scores(query_XR, offsets_Q, keys, HEADS)
    assert torch.equal(inside_QC, chunk_scores(query_XR, offsets_Q, keys, HEADS))


def test_no_chunks_have_no_scores() -> None:
    query_XR, offsets_Q, key_CR = drawn([2, 3], chunks=6, width=8)
    for precision in PRECISIONS:
        assert chunk_scores(query_XR, offsets_Q, RoutingKeys.of(key_CR, precision).rows(4, 4), 2).shape == (2, 0)


def test_int8_errs_by_at_most_half_a_step_an_entry() -> None:
    """An entry is off by at most scale / 2, so q . k is off by at most |q|_1 scale / 2, and scale is max|k| / 127."""
    query_XR, offsets_Q, key_CR = drawn([1] * 9, chunks=50, width=64)
    query_XR = query_XR.bfloat16().float()  # the other rounding out of the way
    exact = chunk_scores(query_XR, offsets_Q, RoutingKeys.of(key_CR, "float32"), HEADS)
    stored = chunk_scores(query_XR, offsets_Q, RoutingKeys.of(key_CR, "int8"), HEADS)
    bound = query_XR.abs().sum(1)[:, None] * key_CR.abs().amax(1) / 127 / 2 / HEADS
    error = (stored - exact).abs()
    assert bool((error <= bound + 1e-6).all())
    assert error.max() > bound.min() / 50, "an error of nothing would mean that nothing was rounded"


def test_a_vector_of_zeros_is_stored_as_one() -> None:
    key_CR = torch.tensor([[0.0, 0.0], [1e-41, -1e-41], [0.3, -0.6]])
    for precision in PRECISIONS:
        keys = RoutingKeys.of(key_CR, precision)
        assert keys.floats().isfinite().all() and keys.floats()[0].tolist() == [0, 0]
        assert chunk_scores(torch.ones(1, 2), torch.tensor([0, 1]), keys, 1).isfinite().all()


def test_stored_vectors_stand_for_what_was_given() -> None:
    *_, key_CR = drawn([1], chunks=9, width=10)
    for precision, step in (("float32", 0.0), ("bfloat16", 2.0**-8), ("int8", 1 / 254)):
        keys = RoutingKeys.of(key_CR, precision)  # type: ignore[arg-type]
        assert keys.precision == precision and len(keys) == 9 and keys.floats().dtype == torch.float32
        assert bool(((keys.floats() - key_CR).abs() <= step * 1.0001 * key_CR.abs().amax(1, keepdim=True)).all())
        stored = keys.vector_CR.nbytes + (0 if keys.scale_C is None else keys.scale_C.nbytes)
        assert stored == 9 * RoutingKeys.bytes_per_chunk(10, keys.precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_keys_are_cut_moved_and_pickled_whole(precision: Precision) -> None:
    *_, key_CR = drawn([1], chunks=9, width=10)
    keys = RoutingKeys.of(key_CR, precision)
    part = keys.rows(2, 7)
    assert torch.equal(part.floats(), keys.floats()[2:7])
    assert part.vector_CR.data_ptr() == keys.vector_CR[2:].data_ptr(), "a part is no copy"
    for same in (keys.to("cpu"), pickle.loads(pickle.dumps(keys))):  # noqa: S301
        assert same.precision == precision and torch.equal(same.floats(), keys.floats())
        assert (same.scale_C is None) == (precision != "int8")
    before = keys.vector_CR.clone()
    keys.floats()
    assert torch.equal(keys.vector_CR, before)


def test_the_kernel_says_why_it_cannot_run() -> None:
    query_XR, offsets_Q, key_CR = drawn([2], chunks=3, width=16)
    with pytest.raises(UserError, match="needs queries and keys on CUDA"):
        chunk_scores(query_XR, offsets_Q, RoutingKeys.of(key_CR, "int8"), 1, "triton")


@needs_cuda
def test_the_kernel_says_what_keys_it_needs() -> None:
    query_XR, offsets_Q, key_CR = (tensor.cuda() for tensor in drawn([2], chunks=3, width=22))
    with pytest.raises(UserError, match="they are float32"):
        chunk_scores(query_XR, offsets_Q, RoutingKeys.of(key_CR, "float32"), 1, "triton")
    with pytest.raises(UserError, match="it is 22"):
        chunk_scores(query_XR, offsets_Q, RoutingKeys.of(key_CR, "int8"), 1, "triton")


CASES = [([64], 128), ([64], 1024), ([1], 16), ([5, 130, 1, 40], 48), ([129, 300], 1024)]


@needs_cuda
@pytest.mark.parametrize("chunks", [1, 257, 2003])
@pytest.mark.parametrize(("lengths", "width"), CASES)
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_the_kernel_equals_the_reference(precision: Precision, lengths: list[int], width: int, chunks: int) -> None:
    query_XR, offsets_Q, key_CR = (tensor.cuda() for tensor in drawn(lengths, chunks, width, groups=8))
    keys = RoutingKeys.of(key_CR, precision)
    ours, theirs = (chunk_scores(query_XR, offsets_Q, keys, HEADS, backend) for backend in ("triton", "torch"))
    # sums of up to 1,024 products of size 1 or less in another order; one rounding to bfloat16 would show as 1e-2
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@needs_cuda
@pytest.mark.parametrize("chunks", [1, 257, 2003])
@pytest.mark.parametrize(("lengths", "width"), CASES)
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_the_kernel_is_exact_on_whole_numbers(
    precision: Precision, lengths: list[int], width: int, chunks: int
) -> None:
    """Chunks and documents, on any part of the keys, by whichever back end `auto` is."""
    query_XR, offsets_Q, keys = whole_numbers(lengths, chunks, width, precision)
    query_XR, offsets_Q, keys = query_XR.cuda(), offsets_Q.cuda(), keys.to("cuda")
    document_C = torch.randint(0, 77, (chunks,), generator=torch.Generator().manual_seed(0)).cuda()
    for start, stop in ((0, chunks), (chunks // 3, chunks), (chunks // 2, chunks // 2)):
        part, owner_C = keys.rows(start, stop), document_C[start:stop]
        ours, theirs = (
            [
                chunk_scores(query_XR, offsets_Q, part, HEADS, backend),
                document_ordinals(query_XR, offsets_Q, part, owner_C, 80, HEADS, backend),
            ]
            for backend in ("auto", "torch")
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
