"""Segment: consecutive documents of a memory bank, encoded together and never changed.

A bank is a list of segments: adding makes a new one, removing marks documents as gone, and no other document is
touched. In memory and in a file a segment is the same tensors, so a file opened by memory map is a segment whose pages
are read when they are needed. The invariant: numbers ascend within a segment, and a chunk never crosses documents.

Shapes: D documents, C chunks, G key/value heads, W head width, R = G * W, L routed layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_train.kernels.maxsim import Precision, RoutingKeys
from msa_train.memory.strings import Strings, offsets_of
from msa_train.model import DocumentMemory
from msa_train.search import LOW

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Passage:
    """A document on its way into a bank.

    Args:
        id: Its name, unique within the bank.
        text: Its words.
        tokens: Token ids of `" " + text`.
        source: Name of the document that it is a part of, where it is one; its own begins with it.
    """

    id: str
    text: str
    tokens: Sequence[int] | NDArray[np.int32]
    source: str = ""


@dataclass(frozen=True)
class BankShape:
    """What two banks must share to be one: who encoded them, and in which sizes.

    Args:
        model: Fingerprint of the model's weights.
        text: Fingerprint of tokenizer and protocol.
        chunk_size: Tokens per chunk.
        layers: Routed layers.
        groups: Key/value heads G.
        width: Head width W.
        dtype: Precision of keys and values, as torch names it.
        precision: Precision of the routing keys.
    """

    model: str
    text: str
    chunk_size: int
    layers: tuple[int, ...]
    groups: int
    width: int
    dtype: str
    precision: Precision

    @property
    def torch_dtype(self) -> torch.dtype:
        """Precision of keys and values."""
        return getattr(torch, self.dtype)

    def key_bytes(self, chunks: int) -> int:
        """Bytes of the routing keys of so many chunks, over all layers.

        >>> BankShape("", "", 64, tuple(range(18)), 8, 128, "bfloat16", "bfloat16").key_bytes(1_562_500) / 1e9
        57.6
        """
        return chunks * len(self.layers) * RoutingKeys.bytes_per_chunk(self.groups * self.width, self.precision)

    def value_bytes(self, chunks: int) -> int:
        """Bytes of the pooled keys and values of so many chunks, over all layers."""
        return chunks * len(self.layers) * 2 * self.groups * self.width * self.torch_dtype.itemsize


@dataclass(frozen=True)
class LayerSegment:
    """What one routed layer keeps of a segment.

    Args:
        keys: Routing keys.
        key_CGW: Pooled keys.
        value_CGW: Pooled values.
    """

    keys: RoutingKeys
    key_CGW: Tensor
    value_CGW: Tensor


@dataclass(frozen=True)
class Segment:
    """Encoded documents.

    Args:
        number_D: Their numbers, ascending, int64, on the host.
        tokens_D: Tokens of each, its wrapping included, int64, on the host.
        chunk_offsets_D: Where each one's chunks begin, D + 1 values, int64, on the host.
        ids: Their names.
        source_end_D: Where in its name that of the document ends which it is a part of, in characters; at the end where
            it is whole; int32, on the host.
        texts: Their words.
        layers: What every routed layer keeps.
        live_D: Which of them have not been removed, bool, on the host.
        file: Name of the file that holds it, where there is one.
        mapped: Whether pooled keys and values lie in a file's memory map.
    """

    number_D: Tensor
    tokens_D: Tensor
    chunk_offsets_D: Tensor
    ids: Strings
    source_end_D: Tensor
    texts: Strings
    layers: tuple[LayerSegment, ...]
    live_D: Tensor
    file: str | None = None
    mapped: bool = False

    @property
    def documents(self) -> int:
        """Documents, removed ones included."""
        return len(self.number_D)

    @property
    def chunks(self) -> int:
        """Chunks, removed ones included."""
        return int(self.chunk_offsets_D[-1])

    def source(self, row: int) -> str:
        """Name of the document that one is a part of; its own where it is whole."""
        return self.ids[row][: int(self.source_end_D[row])]

    @staticmethod
    def of(
        passages: Sequence[Passage],
        numbers: Sequence[int],
        lengths: Sequence[int],
        memory: DocumentMemory,
        shape: BankShape,
    ) -> Segment:
        """Takes over what a model encoded.

        Args:
            passages: The documents.
            numbers: Their numbers, ascending.
            lengths: Tokens of each as encoded.
            memory: Their memory, on any device.
            shape: Precisions to keep.
        """
        assert list(numbers) == sorted(set(numbers)) and numbers[0] > 0 and numbers[-1] < LOW
        assert all(passage.id.startswith(passage.source) for passage in passages)
        return Segment(
            number_D=torch.tensor(list(numbers), dtype=torch.int64),
            tokens_D=torch.tensor(list(lengths), dtype=torch.int64),
            chunk_offsets_D=memory.chunks.offsets_D.cpu(),
            ids=Strings.of([passage.id for passage in passages]),
            source_end_D=torch.tensor([len(passage.source or passage.id) for passage in passages], dtype=torch.int32),
            texts=Strings.of([passage.text for passage in passages]),
            layers=tuple(
                LayerSegment(
                    RoutingKeys.of(layer.router_key_CR, shape.precision).to("cpu"),
                    layer.key_CGW.to("cpu", shape.torch_dtype),
                    layer.value_CGW.to("cpu", shape.torch_dtype),
                )
                for layer in memory.layers
            ),
            live_D=torch.ones(len(passages), dtype=torch.bool),
        )

    @staticmethod
    def join(parts: Sequence[Segment]) -> Segment:
        """One segment of several, in order."""
        if len(parts) == 1:
            return parts[0]
        counts = torch.cat([part.chunk_offsets_D.diff() for part in parts])
        return Segment(
            number_D=torch.cat([part.number_D for part in parts]),
            tokens_D=torch.cat([part.tokens_D for part in parts]),
            chunk_offsets_D=offsets_of(counts),
            ids=Strings.join([part.ids for part in parts]),
            source_end_D=torch.cat([part.source_end_D for part in parts]),
            texts=Strings.join([part.texts for part in parts]),
            layers=tuple(
                LayerSegment(
                    join_keys([layer.keys for layer in layers]),
                    torch.cat([layer.key_CGW for layer in layers]),
                    torch.cat([layer.value_CGW for layer in layers]),
                )
                for layers in zip(*(part.layers for part in parts), strict=True)
            ),
            live_D=torch.cat([part.live_D for part in parts]),
        )

    def slice(self, first: int, last: int) -> Segment:
        """Documents `first .. last - 1`, without copying what is large."""
        start, stop = int(self.chunk_offsets_D[first]), int(self.chunk_offsets_D[last])
        return Segment(
            number_D=self.number_D[first:last],
            tokens_D=self.tokens_D[first:last],
            chunk_offsets_D=self.chunk_offsets_D[first : last + 1] - start,
            ids=self.ids.slice(first, last),
            source_end_D=self.source_end_D[first:last],
            texts=self.texts.slice(first, last),
            layers=tuple(
                LayerSegment(layer.keys.rows(start, stop), layer.key_CGW[start:stop], layer.value_CGW[start:stop])
                for layer in self.layers
            ),
            live_D=self.live_D[first:last],
            mapped=self.mapped,
        )

    def compact(self) -> Segment:
        """A copy without its removed documents."""
        counts, live_D = self.chunk_offsets_D.diff(), self.live_D
        keep_C = live_D.repeat_interleave(counts)
        return Segment(
            number_D=self.number_D[live_D],
            tokens_D=self.tokens_D[live_D],
            chunk_offsets_D=offsets_of(counts[live_D]),
            ids=self.ids.pick(live_D),
            source_end_D=self.source_end_D[live_D],
            texts=self.texts.pick(live_D),
            layers=tuple(
                LayerSegment(layer.keys._map(lambda rows: rows[keep_C]), layer.key_CGW[keep_C], layer.value_CGW[keep_C])
                for layer in self.layers
            ),
            live_D=live_D[live_D],
        )

    def without(self, numbers: Sequence[int]) -> Segment:
        """The same with these documents marked as removed."""
        gone = torch.isin(self.number_D, torch.tensor(list(numbers), dtype=torch.int64))
        return replace(self, live_D=self.live_D & ~gone)

    def place(self, pooled: Change | None = None, keys: Change | None = None) -> Segment:
        """The same with its tensors put elsewhere.

        Args:
            pooled: What is done with pooled keys and values.
            keys: What is done with routing keys.
        """
        layers = self.layers
        if keys is not None:
            layers = tuple(replace(layer, keys=layer.keys._map(keys)) for layer in layers)
        if pooled is not None:
            layers = tuple(LayerSegment(layer.keys, pooled(layer.key_CGW), pooled(layer.value_CGW)) for layer in layers)
        return replace(self, layers=layers, mapped=self.mapped and pooled is None)


def join_keys(parts: Sequence[RoutingKeys]) -> RoutingKeys:
    """Keys of several, in order, all of one precision."""
    scales = [part.scale_C for part in parts if part.scale_C is not None]
    return RoutingKeys(torch.cat([part.vector_CR for part in parts]), torch.cat(scales) if scales else None)
