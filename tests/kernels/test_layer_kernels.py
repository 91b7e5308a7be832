"""Chunk means, head norms with rotary positions, compiled element-wise work: each fast form equals its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from msa_train.errors import UserError
from msa_train.kernels.elementwise import add_norm, gate, rms_norm, run, take_over
from msa_train.kernels.pool import pool_chunks
from msa_train.kernels.rope import norm_rotate

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DTYPES = (torch.float32, torch.bfloat16)


def draw(*shape: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device, dtype).requires_grad_()


def with_gradients(function: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
    """Outputs, and gradients of all tensors for a fixed cotangent."""
    out = function(*tensors)
    outs = list(out) if isinstance(out, tuple) else [out]
    total = sum((one.float() * draw(*one.shape, seed=9).to(one.device)).sum() for one in outs)
    gradients = torch.autograd.grad(total, [tensor for tensor in tensors if tensor.requires_grad])
    return [*(one.detach() for one in outs), *gradients]


def check(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        size = float(other.abs().max()) + 1e-3
        bound = 2e-5 if dtype == torch.float32 else 2e-2  # three roundings of 2^-9, of sums over rows more
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=bound * size)


# --- chunk means -------------------------------------------------------------------------------------------------

LENGTHS = (64, 1, 17, 64, 3, 40, 200)


def offsets(device: str = "cpu") -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).to(device)


def test_chunk_means_by_hand() -> None:
    states = draw(sum(LENGTHS), 3, 5)
    mean = pool_chunks(states, offsets())
    first = 0
    for number, length in enumerate(LENGTHS):
        torch.testing.assert_close(mean[number], states[first : first + length].mean(0))
        first += length


@cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 8), (8, 128), (300,)])
def test_the_pooling_kernel_is_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    states = draw(sum(LENGTHS), *shape, device="cuda", dtype=dtype)
    ways = [
        with_gradients(lambda states, way=way: pool_chunks(states, offsets("cuda"), way), states)
        for way in ("triton", "torch")
    ]
    check(*ways, dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_kernel_that_cannot_run_says_so() -> None:
    with pytest.raises(UserError, match=r"kernels\.pool: 'triton' needs CUDA"):
        pool_chunks(draw(4, 2), torch.tensor([0, 4]), "triton")
    with pytest.raises(UserError, match=r"kernels\.rope: 'triton' needs CUDA"):
        norm_rotate(draw(4, 2, 8), draw(4, 8), draw(4, 8), backend="triton")


# --- head norms and rotary positions -----------------------------------------------------------------------------


def factors(tokens: int, width: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rotary factors whose halves differ, as no decoder of ours has them: a swapped half would show."""
    angle = torch.arange(tokens)[:, None] * torch.linspace(1.0, 0.01, width)[None]
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def test_norm_and_rotation_are_hugging_faces() -> None:
    tokens, heads, width = 7, 3, 8
    norm = Qwen3RMSNorm(width, eps=1e-6)
    norm.weight.data = draw(width, seed=3).detach() + 1
    angle = torch.arange(tokens)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2)[None]
    states = draw(tokens, heads, width)
    wanted, _ = apply_rotary_pos_emb(
        norm(states).transpose(0, 1)[None], states.transpose(0, 1)[None], angle.cos()[None], angle.sin()[None]
    )
    found = norm_rotate(states, angle.cos(), angle.sin(), norm.weight, 1e-6)
    torch.testing.assert_close(found, wanted[0].transpose(0, 1))
    assert Qwen3Config().rms_norm_eps == norm.variance_epsilon


@cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 8), (77, 3, 64), (4500, 32, 128)])
def test_the_rotation_kernel_is_the_reference(
    dtype: torch.dtype, normed: bool, tokens: int, heads: int, width: int
) -> None:
    """77 x 3 rows leave a part of a program over; 4,500 x 32 are more than one round of all programs."""
    cos, sin = factors(tokens, width, "cuda", dtype)
    states = draw(tokens, heads, width, device="cuda", dtype=dtype)
    weight = (draw(width, seed=1) + 1).detach().to("cuda", dtype).requires_grad_()

    def turn(backend: Any, states: Tensor, weight: Tensor | None = None) -> Tensor:
        return norm_rotate(states, cos, sin, weight, 1e-6, backend)

    tensors = [states, weight] if normed else [states]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    found = with_gradients(lambda *given: turn("triton", *given), *tensors)
    cos, sin = cos.double(), sin.double()
    wanted = [value.to(dtype) for value in with_gradients(lambda *given: turn("torch", *given), *exact)]
    check(found, wanted, dtype)


# --- compiled element-wise work ----------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
def test_under_autocast_a_norm_is_rounded_once_to_what_every_product_would_round_it_to(residual: bool) -> None:
    norm, before = Qwen3RMSNorm(12, eps=1e-6), Qwen3RMSNorm(12, eps=1e-6)
    norm.weight.data = before.weight.data = draw(12, seed=3).detach() + 1
    take_over(norm, "plain")
    layer, states, added = torch.nn.Linear(12, 7), draw(5, 12), draw(5, 12, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if residual:
            total, normed = norm(states, added=added)
            assert total.dtype == torch.float32 and torch.equal(total, states + added)
        else:
            total, normed = states, norm(states)
        assert normed.dtype == torch.bfloat16 and before(total).dtype == torch.float32
        assert torch.equal(layer(normed), layer(before(total)))
    assert norm(states).dtype == torch.float32, "and as it is without"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_work_is_the_plain_function(device: str, dtype: torch.dtype) -> None:
    """For streams of several lengths, one token included."""
    for tokens in (5, 12, 1):
        states, added = (draw(tokens, 24, seed=seed, device=device, dtype=dtype) for seed in (1, 2))
        weight = draw(24, seed=3, device=device, dtype=dtype)
        works = {rms_norm: (states, weight), add_norm: (states, added, weight), gate: (states, added)}
        for function, tensors in works.items():
            eps = () if function is gate else (1e-6,)
            ways = [
                with_gradients(lambda *given, way=way, f=function, eps=eps: run(way, f, *given, *eps), *tensors)
                for way in ("compiled", "plain")
            ]
            check(*ways, dtype)


def test_a_norm_that_was_taken_over_is_what_it_was() -> None:
    norm, states, added = Qwen3RMSNorm(12), draw(5, 12), draw(5, 12, seed=1)
    before, after = norm(states), norm(states + added)
    take_over(norm, "auto")
    assert torch.equal(norm(states), before)
    total, normed = norm(states, added=added)
    assert torch.equal(total, states + added) and torch.equal(normed, after)
