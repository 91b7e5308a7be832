"""Causal attention over many sequences of different lengths laid end to end: one interface, three back ends.

Sequence b owns the queries `query_offsets[b] .. [b+1]` and the keys `key_offsets[b] .. [b+1]`. Its last query is
aligned with its last key ("bottom right"), so query i of a sequence with q queries and n keys sees keys 0 .. n-q+i.
Sequences never see each other: that is the invariant, and tests/kernels prove it for every back end by perturbation.

Shapes: T queries, N keys, H query heads, G key/value heads (H a multiple of G), W head width, B sequences.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from msa_train.errors import UserError

Backend = Literal["auto", "torch", "flash", "sdpa"]


@dataclass(frozen=True)
class Sequences:
    """Where sequences begin and end.

    Args:
        query_offsets: Cumulative query lengths, B + 1 values, int32.
        key_offsets: Cumulative key lengths, B + 1 values, int32; the last may lie below the number of key rows.
        longest_query: At least the longest query length, known on the host.
        longest_key: At least the longest key length, likewise.
    """

    query_offsets: Tensor
    key_offsets: Tensor
    longest_query: int
    longest_key: int

    @property
    def square(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return self.query_offsets is self.key_offsets


def varlen_attention(
    query_THW: Tensor,
    key_NGW: Tensor,
    value_NGW: Tensor,
    sequences: Sequences,
    scale: float,
    backend: Backend = "auto",
) -> Tensor:
    """Causal attention within each sequence.

    Args:
        query_THW: Queries, all of one dtype with keys and values.
        key_NGW: Keys.
        value_NGW: Values.
        sequences: The layout.
        scale: Factor on the scores.
        backend: `torch` is `torch.nn.attention.varlen` (CUDA, half precision), `flash` the flash-attn package, `sdpa`
            plain PyTorch anywhere; `auto` takes the first that can serve these tensors.

    Returns:
        [T, H, W].

    Raises:
        UserError: The named back end cannot run here.
    """
    name = _auto(query_THW) if backend == "auto" else backend
    if name != "sdpa" and not sequences.square:
        key_NGW, value_NGW = (_OwnedRows.apply(rows, sequences.key_offsets) for rows in (key_NGW, value_NGW))
    if name == "torch":
        return _torch_varlen(query_THW, key_NGW, value_NGW, sequences, scale)
    if name == "flash":
        return _flash_attn(query_THW, key_NGW, value_NGW, sequences, scale)
    return _sdpa(query_THW, key_NGW, value_NGW, sequences, scale)


def _auto(query: Tensor) -> Backend:
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return "sdpa"
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return "torch"
    return "flash" if importlib.util.find_spec("flash_attn") is not None else "sdpa"


@functools.cache
def _torch_varlen_options(grouped: bool) -> dict[str, Any]:
    # torch 2.11 takes is_causal or window_size; from 2.12 on window_size alone, and enable_gqa for grouped heads
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    if grouped and "enable_gqa" in names:
        options["enable_gqa"] = True
    return options


def _torch_varlen(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> Tensor:
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        raise UserError("attention: back end 'torch' needs CUDA and half precision; use 'sdpa' or precision bf16")
    from torch.nn.attention.varlen import varlen_attn

    options = _torch_varlen_options(query.shape[1] != key.shape[1])
    out = varlen_attn(
        query,
        key,
        value,
        sequences.query_offsets,
        sequences.key_offsets,
        sequences.longest_query,
        sequences.longest_key,
        scale=scale,
        **options,
    )
    assert isinstance(out, Tensor)
    return out


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> Tensor:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise UserError("attention: back end 'flash' needs the flash-attn package: pip install flash-attn") from error
    return flash_attn_varlen_func(
        query,
        key,
        value,
        sequences.query_offsets,
        sequences.key_offsets,
        sequences.longest_query,
        sequences.longest_key,
        softmax_scale=scale,
        causal=True,
    )


class _OwnedRows(torch.autograd.Function):
    """Passes keys or values on; in the backward pass, rows behind the last offset get no gradient.

    The fused kernels never write the gradient of rows that no sequence owns, and hand back whatever memory held.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (offsets,) = ctx.saved_tensors
        nobodys = torch.arange(len(gradient), device=gradient.device) >= offsets[-1]
        return gradient.masked_fill(nobodys[:, None, None], 0.0), None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> Tensor:
    """The reference: each sequence becomes one padded row of a batch. Its cost is that of the longest sequence."""
    places = _Padding.of(sequences.query_offsets, sequences.longest_query, from_end=not sequences.square)
    query_BHQW = places.pad(query)
    if sequences.square:  # padding stands behind every real token, where a causal query never looks
        key_BGNW, value_BGNW = places.pad(key), places.pad(value)
        out = F.scaled_dot_product_attention(
            query_BHQW, key_BGNW, value_BGNW, is_causal=True, scale=scale, enable_gqa=True
        )
        return places.unpad(out, len(query))
    keys = _Padding.of(sequences.key_offsets, sequences.longest_key, from_end=True)
    reach = torch.arange(keys.width, device=query.device) - (keys.width - 1)
    last = torch.arange(places.width, device=query.device) - (places.width - 1)
    allowed_BQN = keys.real_BX[:, None, :] & (reach[None, :] <= last[:, None])
    allowed_BQN = (
        allowed_BQN | ~places.real_BX[:, :, None]
    )  # a padded query sees all, for a softmax over nothing is NaN
    out = F.scaled_dot_product_attention(
        query_BHQW, keys.pad(key), keys.pad(value), attn_mask=allowed_BQN[:, None], scale=scale, enable_gqa=True
    )
    return places.unpad(out, len(query))


@dataclass(frozen=True)
class _Padding:
    """Rows of a ragged layout inside a padded batch, aligned at the start or at the end."""

    row_BX: Tensor
    real_BX: Tensor
    offsets: Tensor
    width: int
    from_end: bool

    @staticmethod
    def of(offsets: Tensor, width: int, from_end: bool) -> _Padding:
        offsets = offsets.long()
        column = torch.arange(width, device=offsets.device)
        start = offsets[1:] - width if from_end else offsets[:-1]
        row_BX = start[:, None] + column
        real_BX = (row_BX >= offsets[:-1, None]) & (row_BX < offsets[1:, None])
        return _Padding(row_BX, real_BX, offsets, width, from_end)

    def pad(self, ragged: Tensor) -> Tensor:
        rows = self.row_BX.clamp(0, len(ragged) - 1).flatten()
        return ragged.index_select(0, rows).view(*self.row_BX.shape, *ragged.shape[1:]).transpose(1, 2)

    def unpad(self, padded_BHXW: Tensor, length: int) -> Tensor:
        token = torch.arange(length, device=padded_BHXW.device)
        sequence = torch.searchsorted(self.offsets[1:], token, right=True)
        start = self.offsets[sequence + 1] - self.width if self.from_end else self.offsets[sequence]
        return padded_BHXW.transpose(1, 2).flatten(0, 1).index_select(0, sequence * self.width + token - start)
