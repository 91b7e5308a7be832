"""Head norm and rotation as kernels: a row is one head of one token, and stays on the chip in two halves.

With x^ = x r, r = 1 / sqrt(mean x^2 + eps), n = w x^, and halves 1 and 2 of a row:

    y_1 = n_1 c_1 - n_2 s_1              n'_1 = y'_1 c_1 + y'_2 s_2
    y_2 = n_2 c_2 + n_1 s_2              n'_2 = y'_2 c_2 - y'_1 s_1
    x' = r (w n' - x^ mean(w n' x^))     w' = sum over rows of n' x^

where ' marks gradients. Backward reads x again and keeps no r. The invariant: a program owns its rows, and its own row
of partial sums of w', so nothing is added atomically and results repeat bitwise.

Shapes: T tokens, H heads, W head width.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

ROWS = 32  # rows of a program at a time
PROGRAMS = 2048  # of the backward pass, at most: each leaves a partial sum


def turn(states_THW: Tensor, cos_TW: Tensor, sin_TW: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Norm (unless `weight` is None) and rotation; all tensors contiguous, on CUDA. [T, H, W], the states' dtype."""
    tokens, heads, width = states_THW.shape
    out_THW = torch.empty_like(states_THW)
    if not tokens:
        return out_THW
    with torch.cuda.device(states_THW.device):
        _turn[(triton.cdiv(tokens * heads, ROWS),)](
            states_THW, cos_TW, sin_TW, weight, out_THW, tokens * heads, eps, H=heads, HALF=width // 2, ROWS=ROWS
        )
    return out_THW


def turn_back(
    gradient_THW: Tensor, states_THW: Tensor, cos_TW: Tensor, sin_TW: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the states and of the norm's weight."""
    tokens, heads, width = states_THW.shape
    rows = tokens * heads
    of_states = torch.empty_like(states_THW)
    programs = max(min(triton.cdiv(rows, ROWS), PROGRAMS), 1)
    partial = None if weight is None else states_THW.new_zeros(programs, width, dtype=torch.float32)
    if tokens:
        with torch.cuda.device(states_THW.device):
            _turn_back[(programs,)](
                gradient_THW, states_THW, cos_TW, sin_TW, weight, of_states, partial, rows, eps,
                H=heads, HALF=width // 2, ROWS=ROWS, num_warps=4,
            )  # fmt: skip
    return of_states, None if partial is None or weight is None else partial.sum(0).to(weight.dtype)


@triton.jit(do_not_specialize=["rows"])
def _turn(
    state_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column_H = tl.arange(0, HALF)
    real = (row_R < rows)[:, None]
    first = row_R[:, None] * (2 * HALF) + column_H[None, :]
    factor = (row_R // H)[:, None] * (2 * HALF) + column_H[None, :]
    x_1 = tl.load(state_ptr + first, mask=real, other=0.0).to(tl.float32)
    x_2 = tl.load(state_ptr + first + HALF, mask=real, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        scale_R = tl.rsqrt((tl.sum(x_1 * x_1, 1) + tl.sum(x_2 * x_2, 1)) / (2 * HALF) + eps)
        x_1 *= scale_R[:, None] * tl.load(weight_ptr + column_H).to(tl.float32)[None, :]
        x_2 *= scale_R[:, None] * tl.load(weight_ptr + HALF + column_H).to(tl.float32)[None, :]
    c_1, c_2 = tl.load(cos_ptr + factor, mask=real), tl.load(cos_ptr + factor + HALF, mask=real)
    s_1, s_2 = tl.load(sin_ptr + factor, mask=real), tl.load(sin_ptr + factor + HALF, mask=real)
    y_1 = x_1 * c_1.to(tl.float32) - x_2 * s_1.to(tl.float32)
    y_2 = x_2 * c_2.to(tl.float32) + x_1 * s_2.to(tl.float32)
    tl.store(out_ptr + first, y_1.to(out_ptr.dtype.element_ty), mask=real)
    tl.store(out_ptr + first + HALF, y_2.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows"])
def _turn_back(
    gradient_ptr: tl.tensor,
    state_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    column_H = tl.arange(0, HALF)
    sum_1, sum_2 = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    if weight_ptr is not None:
        w_1 = tl.load(weight_ptr + column_H).to(tl.float32)[None, :]
        w_2 = tl.load(weight_ptr + HALF + column_H).to(tl.float32)[None, :]
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row_R = start.to(tl.int64) + tl.arange(0, ROWS)  # type: ignore[attr-defined, unused-ignore]
        real = (row_R < rows)[:, None]
        first = row_R[:, None] * (2 * HALF) + column_H[None, :]
        factor = (row_R // H)[:, None] * (2 * HALF) + column_H[None, :]
        y_1 = tl.load(gradient_ptr + first, mask=real, other=0.0).to(tl.float32)
        y_2 = tl.load(gradient_ptr + first + HALF, mask=real, other=0.0).to(tl.float32)
        c_1 = tl.load(cos_ptr + factor, mask=real, other=0.0).to(tl.float32)
        c_2 = tl.load(cos_ptr + factor + HALF, mask=real, other=0.0).to(tl.float32)
        s_1 = tl.load(sin_ptr + factor, mask=real, other=0.0).to(tl.float32)
        s_2 = tl.load(sin_ptr + factor + HALF, mask=real, other=0.0).to(tl.float32)
        n_1 = y_1 * c_1 + y_2 * s_2
        n_2 = y_2 * c_2 - y_1 * s_1
        if weight_ptr is not None:
            x_1 = tl.load(state_ptr + first, mask=real, other=0.0).to(tl.float32)
            x_2 = tl.load(state_ptr + first + HALF, mask=real, other=0.0).to(tl.float32)
            scale_R = tl.rsqrt((tl.sum(x_1 * x_1, 1) + tl.sum(x_2 * x_2, 1)) / (2 * HALF) + eps)[:, None]
            x_1, x_2 = x_1 * scale_R, x_2 * scale_R
            sum_1 += tl.sum(n_1 * x_1, 0)
            sum_2 += tl.sum(n_2 * x_2, 0)
            n_1, n_2 = n_1 * w_1, n_2 * w_2
            mean_R = ((tl.sum(n_1 * x_1, 1) + tl.sum(n_2 * x_2, 1)) / (2 * HALF))[:, None]
            n_1, n_2 = scale_R * (n_1 - x_1 * mean_R), scale_R * (n_2 - x_2 * mean_R)
        tl.store(out_ptr + first, n_1.to(out_ptr.dtype.element_ty), mask=real)
        tl.store(out_ptr + first + HALF, n_2.to(out_ptr.dtype.element_ty), mask=real)
    if partial_ptr is not None:
        place = partial_ptr + tl.program_id(0) * (2 * HALF) + column_H
        tl.store(place, sum_1)
        tl.store(place + HALF, sum_2)
