"""Chunk means and their gradient as kernels: one program takes one chunk and a block of columns.

The invariant: every row belongs to exactly one chunk, so each program owns its rows and nothing is added atomically.

Shapes: T tokens, C chunks, X columns.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

ROWS, COLUMNS = 64, 128  # a whole chunk of the usual size at once: its loads are all under way together


def chunk_means(states_TX: Tensor, offsets_C: Tensor) -> Tensor:
    """Mean of each chunk's rows, summed in float32. [C, X], in the states' dtype.

    Args:
        states_TX: Contiguous, on CUDA.
        offsets_C: Cumulative chunk lengths, C + 1 values, int64.
    """
    chunks, width = len(offsets_C) - 1, states_TX.shape[1]
    mean_CX = states_TX.new_empty(chunks, width)
    with torch.cuda.device(states_TX.device):
        _mean[(chunks, triton.cdiv(width, COLUMNS))](states_TX, offsets_C, mean_CX, width, ROWS=ROWS, COLUMNS=COLUMNS)
    return mean_CX


def spread(gradient_CX: Tensor, offsets_C: Tensor, rows: int) -> Tensor:
    """Gradient of `chunk_means`: each row gets its chunk's, over the chunk's length. [T, X]."""
    chunks, width = gradient_CX.shape
    out_TX = gradient_CX.new_empty(rows, width)
    with torch.cuda.device(gradient_CX.device):
        _spread[(chunks, triton.cdiv(width, COLUMNS))](
            gradient_CX, offsets_C, out_TX, width, ROWS=ROWS, COLUMNS=COLUMNS
        )
    return out_TX


@triton.jit
def _mean(
    state_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    chunk = tl.program_id(0).to(tl.int64)
    first, stop = tl.load(offset_ptr + chunk), tl.load(offset_ptr + chunk + 1)
    column_X = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_X = column_X < width
    total_X = tl.zeros([COLUMNS], tl.float32)
    for start in range(first, stop, ROWS):
        row_R = start + tl.arange(0, ROWS)
        place_RX = row_R[:, None] * width + column_X[None, :]
        state_RX = tl.load(state_ptr + place_RX, mask=(row_R < stop)[:, None] & inside_X[None, :], other=0.0)
        total_X += tl.sum(state_RX.to(tl.float32), 0)
    mean_X = total_X / (stop - first).to(tl.float32)
    tl.store(mean_ptr + chunk * width + column_X, mean_X.to(mean_ptr.dtype.element_ty), mask=inside_X)


@triton.jit
def _spread(
    gradient_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    chunk = tl.program_id(0).to(tl.int64)
    first, stop = tl.load(offset_ptr + chunk), tl.load(offset_ptr + chunk + 1)
    column_X = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_X = column_X < width
    gradient_X = tl.load(gradient_ptr + chunk * width + column_X, mask=inside_X, other=0.0).to(tl.float32)
    share_X = (gradient_X / (stop - first).to(tl.float32)).to(out_ptr.dtype.element_ty)
    for start in range(first, stop, ROWS):
        row_R = start + tl.arange(0, ROWS)
        place_RX = row_R[:, None] * width + column_X[None, :]
        tl.store(
            out_ptr + place_RX,
            tl.broadcast_to(share_X[None, :], [ROWS, COLUMNS]),
            mask=(row_R < stop)[:, None] & inside_X[None, :],
        )
