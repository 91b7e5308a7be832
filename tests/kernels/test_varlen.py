"""Ragged causal attention: every back end against a loop, and proof that sequences do not leak."""

from __future__ import annotations

import math

import pytest
import torch

from msa_train.errors import UserError
from msa_train.kernels.varlen import Backend, Sequences, varlen_attention

HEADS, GROUPS, WIDTH = 6, 2, 8
BACKENDS = [
    pytest.param("sdpa", "cpu", torch.float32),
    pytest.param("sdpa", "cuda", torch.float32, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")),
    pytest.param(
        "torch", "cuda", torch.bfloat16, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")
    ),
]


def layout(query: list[int], key: list[int] | None, device: str) -> Sequences:
    def offsets(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)

    first = offsets(query)
    return Sequences(first, first if key is None else offsets(key), max(query), max(key or query))


def inputs(queries: int, keys: int, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = ((queries, HEADS), (keys, GROUPS), (keys, GROUPS))
    width = WIDTH if device == "cpu" else 64
    drawn = [torch.randn(*shape, width, generator=generator) for shape in shapes]
    return [tensor.to(device, dtype).requires_grad_() for tensor in drawn]


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, places: Sequences) -> torch.Tensor:
    out = []
    starts, keys = places.query_offsets.tolist(), places.key_offsets.tolist()
    for (a, b), (c, d) in zip(zip(starts, starts[1:], strict=False), zip(keys, keys[1:], strict=False), strict=True):
        for row in range(a, b):
            seen = slice(c, d - (b - 1 - row))
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                weight = (key[seen, group].float() @ query[row, head].float() / math.sqrt(query.shape[-1])).softmax(0)
                out.append(weight @ value[seen, group].float())
    return torch.stack(out).view(len(query), HEADS, -1)


CASES = [([11, 3, 1, 7], None), ([3, 5, 2], [3, 9, 12]), ([1], [1]), ([4, 4], [4, 17])]


@pytest.mark.parametrize(("query_lengths", "key_lengths"), CASES)
@pytest.mark.parametrize(("backend", "device", "dtype"), BACKENDS)
def test_values_and_gradients_equal_a_loop(
    backend: Backend, device: str, dtype: torch.dtype, query_lengths: list[int], key_lengths: list[int] | None
) -> None:
    places = layout(query_lengths, key_lengths, device)
    spare = 0 if key_lengths is None else 3  # rows behind the last offset belong to nobody
    query, key, value = inputs(sum(query_lengths), sum(key_lengths or query_lengths) + spare, device, dtype)
    ours = varlen_attention(query, key, value, places, query.shape[-1] ** -0.5, backend)
    theirs = reference(query, key, value, places)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours.float(), theirs, atol=tolerance, rtol=tolerance)
    weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1)).to(device)
    mine = torch.autograd.grad((ours.float() * weight).sum(), (query, key, value))
    loop = torch.autograd.grad((theirs * weight).sum(), (query, key, value))
    for a, b in zip(mine, loop, strict=True):
        torch.testing.assert_close(a, b, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize(("backend", "device", "dtype"), BACKENDS)
def test_no_sequence_sees_another(backend: Backend, device: str, dtype: torch.dtype) -> None:
    places = layout([5, 6, 4], [5, 9, 6], device)
    query, key, value = inputs(15, 20, device, dtype)
    before = varlen_attention(query, key, value, places, 0.3, backend)
    with torch.no_grad():
        key[5:14] += 3
        value[5:14] -= 2
    after = varlen_attention(query, key, value, places, 0.3, backend)
    changed = (before != after).flatten(1).any(1)
    assert changed[5:11].all()
    assert not changed[:5].any() and not changed[11:].any()


def test_a_back_end_that_cannot_run_says_so() -> None:
    query, key, value = inputs(4, 4, "cpu", torch.float32)
    with pytest.raises(UserError, match="needs CUDA"):
        varlen_attention(query, key, value, layout([4], None, "cpu"), 1.0, "torch")
    if not torch.cuda.is_available():
        with pytest.raises((UserError, RuntimeError, AssertionError)):
            varlen_attention(query, key, value, layout([4], None, "cpu"), 1.0, "flash")
