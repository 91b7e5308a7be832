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
    """The reference: sequences of like length become the rows of a padded batch, and each batch one SDPA call."""
    starts, stops = sequences.query_offsets[:-1].long(), sequences.query_offsets[1:].long()
    key_starts, key_stops = sequences.key_offsets[:-1].long(), sequences.key_offsets[1:].long()
    outputs: list[Tensor] = []
    first_row = torch.empty_like(starts)  # of each sequence, among the rows of all padded batches
    rows = 0
    for group, width, key_width in _groups_of_like_length(sequences):
        queries = _PaddedRows(starts[group], stops[group], width)
        query_BHQW = queries.pad(query)
        keys = queries if sequences.square else _PaddedRows(key_starts[group], key_stops[group], key_width)
        out = F.scaled_dot_product_attention(
            query_BHQW, keys.pad(key), keys.pad(value), attn_mask=queries.causal(keys), scale=scale, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        slot = torch.arange(len(starts[group]), device=query.device)
        first_row[group] = rows + (slot + 1) * width - (stops[group] - starts[group])
        rows += len(outputs[-1])
    token = torch.arange(len(query), device=query.device)
    sequence = torch.searchsorted(stops, token, right=True)
    return torch.cat(outputs).index_select(0, first_row[sequence] + token - starts[sequence])


def _groups_of_like_length(sequences: Sequences) -> list[tuple[Tensor | slice, int, int]]:
    """Sequence numbers with the widths that hold them: on a CPU lengths within a factor of 1.25 go together (padding
    to the longest costs twice the attention there); elsewhere all do, for looking at lengths would make the host wait.
    """
    if sequences.query_offsets.device.type != "cpu":
        return [(slice(None), sequences.longest_query, sequences.longest_key)]
    length, key_length = sequences.query_offsets.diff(), sequences.key_offsets.diff()
    order = torch.argsort(length, stable=True)
    groups: list[list[int]] = [[]]
    for number in order.tolist():
        if groups[-1] and length[number] > 1.25 * length[groups[-1][0]]:
            groups.append([])
        groups[-1].append(number)
    members = [torch.tensor(group) for group in groups]
    return [(group, int(length[group].max()), int(key_length[group].max())) for group in members]


class _PaddedRows:
    """Sequences of a ragged layout as rows of one width, aligned at their ends."""

    def __init__(self, starts: Tensor, stops: Tensor, width: int) -> None:
        self.row_BX = stops[:, None] - width + torch.arange(width, device=starts.device)
        self.real_BX = self.row_BX >= starts[:, None]
        self.width = width

    def pad(self, ragged: Tensor) -> Tensor:
        rows = self.row_BX.clamp(0, len(ragged) - 1).flatten()
        return ragged.index_select(0, rows).view(*self.row_BX.shape, *ragged.shape[1:]).transpose(1, 2)

    def causal(self, keys: _PaddedRows) -> Tensor:
        """Which keys each query sees: [B, 1, queries, keys]."""
        device = self.row_BX.device
        place = torch.arange(self.width, device=device) - self.width
        key_place = torch.arange(keys.width, device=device) - keys.width
        seen = keys.real_BX[:, None, :] & (key_place[None, :] <= place[:, None])
        return (seen | ~self.real_BX[:, :, None])[:, None]  # a padded query sees all: a softmax over nothing is NaN
