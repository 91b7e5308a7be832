"""Head norm and rotary positions, which every query and key goes through: one pass instead of ten.

Eagerly norm and rotation read and write the states a dozen times; compiled by inductor they took 1.6 ms a layer of
Qwen3-4B at 65,536 tokens on an H200, where the kernel takes a fraction (benchmarks/results/scale.json).

Shapes: T tokens, H heads, W head width.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor

from msa_train.errors import UserError
from msa_train.kernels.elementwise import rms_norm

Backend = Literal["auto", "triton", "torch"]


def norm_rotate(
    states_THW: Tensor,
    cos_TW: Tensor,
    sin_TW: Tensor,
    weight: Tensor | None = None,
    eps: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Root-mean-square norm of every head, where the decoder has one, then rotary positions in the half-split layout
    that Llama and Qwen use.

    A quarter turn of the pair (1, 2):

    >>> norm_rotate(torch.tensor([[[1.0, 2.0]]]), torch.zeros(1, 2), torch.ones(1, 2))
    tensor([[[-2.,  1.]]])

    Args:
        states_THW: Projected queries or keys.
        cos_TW: Rotary factors.
        sin_TW: Likewise.
        weight: The norm's, W values; None for no norm.
        eps: The norm's.
        backend: `triton` is the kernel (CUDA, widths of a power of two), `torch` plain PyTorch anywhere; `auto` takes
            the kernel where it can run.

    Returns:
        [T, H, W]. The kernel rounds once, to the states' dtype; plain PyTorch at every step.

    Raises:
        UserError: The kernel was asked for and cannot run here.
    """
    width = states_THW.shape[-1]
    runs = states_THW.is_cuda and width & (width - 1) == 0 and importlib.util.find_spec("triton") is not None
    if backend == "triton" and not runs:
        raise UserError(
            f"kernels.rope: 'triton' needs CUDA, the triton package and a head width that is a power of two; here are "
            f"{states_THW.device} and width {width}"
        )
    if not runs or backend == "torch":
        normed = states_THW if weight is None else rms_norm(states_THW, weight, eps)
        return rotate(normed, cos_TW, sin_TW)
    return _NormRotate.apply(states_THW, cos_TW, sin_TW, weight, eps)


def rotate(states_THW: Tensor, cos_TW: Tensor, sin_TW: Tensor) -> Tensor:
    """Rotary positions alone, in plain PyTorch."""
    first, second = states_THW.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return states_THW * cos_TW[:, None] + turned * sin_TW[:, None]


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        from msa_train.kernels.rope_triton import turn

        states, cos, sin = states.contiguous(), cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(states, cos, sin, weight)
        ctx.eps = eps
        return turn(states, cos, sin, weight, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, Tensor | None, None]:
        from msa_train.kernels.rope_triton import turn_back

        states, cos, sin, weight = ctx.saved_tensors
        of_states, of_weight = turn_back(gradient.contiguous(), states, cos, sin, weight, ctx.eps)
        return of_states, None, None, of_weight, None
