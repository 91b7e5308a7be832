"""A segment as named tensors, which is what a file holds; and back, when nothing of the file is to be trusted.

The invariant: what `from_tensors` returns can be searched and read without an error, whatever the file held, but for
texts, which are looked at only when one is asked for.

Shapes: as in segment.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msa_train.errors import UserError
from msa_train.kernels.maxsim import DTYPES, RoutingKeys
from msa_train.memory.segment import BankShape, LayerSegment, Segment
from msa_train.memory.strings import Strings
from msa_train.search import LOW


def to_tensors(segment: Segment, layers: Sequence[int]) -> dict[str, Tensor]:
    """All that a file holds, by name; layers are named by their number in the decoder."""
    named = {
        "number": segment.number_D,
        "tokens": segment.tokens_D,
        "chunk_offsets": segment.chunk_offsets_D,
        "id.bytes": segment.ids.bytes_B,
        "id.offsets": segment.ids.offsets_D,
        "source_ends": segment.source_end_D,
        "text.bytes": segment.texts.bytes_B,
        "text.offsets": segment.texts.offsets_D,
    }
    for number, layer in zip(layers, segment.layers, strict=True):
        named[f"{number}.router_key"] = layer.keys.vector_CR
        if layer.keys.scale_C is not None:
            named[f"{number}.router_scale"] = layer.keys.scale_C
        named[f"{number}.key"], named[f"{number}.value"] = layer.key_CGW, layer.value_CGW
    return {name: tensor.contiguous() for name, tensor in named.items()}


def from_tensors(tensors: dict[str, Tensor], shape: BankShape, file: str) -> Segment:
    """A segment of what `to_tensors` gave, every size checked; `file` is named in errors.

    Raises:
        UserError: A tensor is missing, or of another type or size, or documents do not add up.
    """
    take = _Taker(tensors, file)
    number_D = take("number", torch.int64, (None,))
    documents, (groups, width) = len(number_D), (shape.groups, shape.width)
    tokens_D = take("tokens", torch.int64, (documents,))
    offsets_D = take.offsets("chunk_offsets", documents)
    take.check(bool(((number_D > 0) & (number_D < LOW)).all()), "a document's number is out of range")
    take.check(bool((number_D.diff() > 0).all()), "the documents' numbers do not ascend")
    take.check(bool((tokens_D > 0).all()), "a document has no token")
    chunks_D = (tokens_D - 1) // shape.chunk_size + 1
    take.check(torch.equal(chunks_D, offsets_D.diff()), "the chunks are not those of the documents' tokens")
    ids, source_end_D = take.strings("id", documents), take("source_ends", torch.int32, (documents,))
    inside = (source_end_D >= 0) & (source_end_D <= ids.offsets_D.diff())
    take.check(bool(inside.all()), "the name of a part is shorter than its document's")
    chunks, layers = int(offsets_D[-1]), []
    for number in shape.layers:
        scale = take(f"{number}.router_scale", torch.float32, (chunks,)) if shape.precision == "int8" else None
        layers.append(
            LayerSegment(
                RoutingKeys(take(f"{number}.router_key", DTYPES[shape.precision], (chunks, groups * width)), scale),
                take(f"{number}.key", shape.torch_dtype, (chunks, groups, width)),
                take(f"{number}.value", shape.torch_dtype, (chunks, groups, width)),
            )
        )
    return Segment(
        number_D=number_D,
        tokens_D=tokens_D,
        chunk_offsets_D=offsets_D,
        ids=ids,
        source_end_D=source_end_D,
        texts=take.strings("text", documents),
        layers=tuple(layers),
        live_D=torch.ones(documents, dtype=torch.bool),
        mapped=True,
    )


class _Taker:
    """Takes tensors out of a file's, and says what is wrong with it."""

    def __init__(self, tensors: dict[str, Tensor], file: str) -> None:
        self.tensors, self.file = tensors, file

    def __call__(self, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> Tensor:
        found = self.tensors.get(name)
        if found is None:
            raise UserError(f"{self.file}: damaged: it has no '{name}'")
        fits = [want in (None, have) for want, have in zip(shape, found.shape, strict=False)]
        self.check(
            found.ndim == len(shape) and all(fits) and found.dtype == dtype,
            f"'{name}' is {tuple(found.shape)} of {found.dtype}, not {shape} of {dtype}",
        )
        return found

    def check(self, sound: bool, otherwise: str) -> None:
        if not sound:
            raise UserError(f"{self.file}: damaged: {otherwise}")

    def offsets(self, name: str, documents: int) -> Tensor:
        offsets_D = self(name, torch.int64, (documents + 1,))
        # within bounds first: a difference of two numbers that are far apart wraps around
        inside = bool(((offsets_D >= 0) & (offsets_D <= offsets_D[-1])).all())
        ascending = int(offsets_D[0]) == 0 and bool((offsets_D.diff() >= 0).all())
        self.check(inside and ascending, f"'{name}' does not ascend from 0")
        return offsets_D

    def strings(self, name: str, documents: int) -> Strings:
        offsets_D = self.offsets(f"{name}.offsets", documents)
        return Strings(self(f"{name}.bytes", torch.uint8, (int(offsets_D[-1]),)), offsets_D, self.file)
