"""Mean over the chunks of a token stream: what a layer remembers of K (after RoPE), V and its states.

Sums are taken in float32, segment by segment; a cumulative sum would lose digits in differences of large numbers.

Shapes: T tokens, C chunks.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor

from msa_train.errors import UserError

Backend = Literal["auto", "triton", "torch"]


def pool_chunks(states_TX: Tensor, chunk_offsets_C: Tensor, backend: Backend = "auto") -> Tensor:
    """Mean over each chunk's tokens.

    >>> pool_chunks(torch.tensor([[1.0], [3.0], [8.0]]), torch.tensor([0, 2, 3])).flatten()
    tensor([2., 8.])

    Args:
        states_TX: Any trailing dimensions.
        chunk_offsets_C: Cumulative chunk lengths, C + 1 values, int64; no chunk is empty.
        backend: `triton` is the kernel (CUDA), which reads the states as they are; `torch` plain PyTorch anywhere,
            which makes a float32 copy of them first; `auto` takes the kernel where it can run.

    Returns:
        [C, ...], in the states' dtype.

    Raises:
        UserError: The kernel was asked for and cannot run here.
    """
    runs = states_TX.is_cuda and importlib.util.find_spec("triton") is not None
    if backend == "triton" and not runs:
        raise UserError(f"kernels.pool: 'triton' needs CUDA and the triton package, states are on {states_TX.device}")
    flat = states_TX.flatten(1)
    mean = _Pool.apply(flat, chunk_offsets_C) if runs and backend != "torch" else _reference(flat, chunk_offsets_C)
    return mean.unflatten(-1, states_TX.shape[1:])


def _reference(flat: Tensor, chunk_offsets_C: Tensor) -> Tensor:
    mean = torch.segment_reduce(flat.float().contiguous(), "mean", offsets=chunk_offsets_C, axis=0, unsafe=True)
    return mean.to(flat.dtype)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, offsets: Tensor) -> Tensor:
        from msa_train.kernels.pool_triton import chunk_means

        ctx.save_for_backward(offsets)
        ctx.rows = len(flat)
        return chunk_means(flat.contiguous(), offsets)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        from msa_train.kernels.pool_triton import spread

        (offsets,) = ctx.saved_tensors
        return spread(gradient.contiguous(), offsets, ctx.rows), None
