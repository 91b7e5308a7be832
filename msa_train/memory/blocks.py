"""Blocks: the routing keys of a bank where they are searched; and tiers: where its tensors are kept.

In host memory a segment is a block as it is, mapped or not. On a GPU many go into one, since a search should not be
many small launches. The invariant: numbers ascend within a block, and a tile holds whole documents.

Shapes: D documents, C chunks, L routed layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_train.kernels.maxsim import RoutingKeys
from msa_train.memory.segment import Segment, join_keys
from msa_train.search import Tile

# Chunks scored at a time. A tile's scores, and on a CPU its keys as float32, are all that a search allocates; a GPU
# needs tiles large enough to hide the launches between them (docs/memory.md).
TILE = {"cpu": 4_096, "cuda": 1_048_576}


@dataclass(frozen=True)
class Tiers:
    """Where a bank is kept.

    Args:
        router_keys: Routing keys, which every query reads all of: on the `device`, or in `host` memory, from where they
            are copied a tile at a time.
        values: Pooled keys and values, of which a query reads the selected documents' alone: in `host` memory, on the
            `device`, or on `disk`, left in the memory map of a saved bank.

    Host memory is page-locked beside a GPU.
    """

    router_keys: Literal["device", "host"] = "device"
    values: Literal["host", "device", "disk"] = "host"


@dataclass(frozen=True)
class Block:
    """Routing keys of consecutive documents of every layer, where they are searched."""

    keys_L: tuple[RoutingKeys, ...]
    document_C: Tensor
    number_D: Tensor
    live_D: Tensor
    bounds: NDArray[np.int64]  # where each document's chunks begin, on the host

    def slice(self, first: int, last: int) -> Block:
        """Documents `first .. last - 1`, without a copy."""
        start, stop = int(self.bounds[first]), int(self.bounds[last])
        return Block(
            tuple(keys.rows(start, stop) for keys in self.keys_L),
            self.document_C[start:stop] - first,
            self.number_D[first:last],
            self.live_D[first:last],
            self.bounds[first : last + 1] - start,
        )

    def tile(self, layer: int, first: int, last: int) -> Tile:
        """Documents `first .. last - 1` as a layer searches them, without a copy of their keys."""
        start, stop = int(self.bounds[first]), int(self.bounds[last])
        owner_C = self.document_C[start:stop] - first
        return Tile(self.keys_L[layer].rows(start, stop), owner_C, self.number_D[first:last], self.live_D[first:last])

    def cuts(self, most: int) -> list[tuple[int, int]]:
        """Documents `first .. last` of each tile: as many as have `most` chunks together, at least one."""
        cuts, first, documents = [], 0, len(self.bounds) - 1
        while first < documents:
            last = int(np.searchsorted(self.bounds, self.bounds[first] + most, side="right")) - 1
            cuts.append((first, last := max(last, first + 1)))
            first = last
        return cuts


def blocks_of(segments: Sequence[Segment], device: torch.device | None) -> Iterator[Block]:
    """Routing keys of segments.

    Args:
        segments: The segments.
        device: Where the keys are to be; None leaves them where they are.
    """
    groups: list[list[Segment]] = []
    most = 0 if device is None or device.type == "cpu" else TILE["cuda"]
    for segment in segments:
        last = groups[-1] if groups else []
        joined = sum(one.chunks for one in last) + segment.chunks
        if last and joined <= most and int(last[-1].number_D[-1]) < int(segment.number_D[0]):
            last.append(segment)
        else:
            groups.append([segment])
    for group in groups:
        counts = torch.cat([segment.chunk_offsets_D.diff() for segment in group])
        layers = zip(*(segment.layers for segment in group), strict=True)
        place = torch.device("cpu") if device is None else device
        keys_L = tuple(_to_device([layer.keys for layer in parts], place) for parts in layers)
        yield Block(
            keys_L,
            torch.repeat_interleave(torch.arange(len(counts)), counts).to(place),
            torch.cat([segment.number_D for segment in group]).to(place),
            torch.cat([segment.live_D for segment in group]).to(place),
            np.concatenate([[0], np.cumsum(counts.numpy())]),
        )


def _to_device(parts: Sequence[RoutingKeys], device: torch.device) -> RoutingKeys:
    if device.type == "cpu" and len(parts) == 1:
        return parts[0]
    return join_keys([part.to(device) for part in parts])


def placed(segment: Segment, device: torch.device, tiers: Tiers) -> Segment:
    """A segment in its tiers; what is mapped stays so for `disk`, and routing keys on a CPU."""
    cuda = device.type == "cuda"
    if cuda and tiers.router_keys == "host":
        segment = segment.place(keys=Tensor.pin_memory)
    if tiers.values == "device":
        return segment.place(lambda tensor: tensor.to(device))
    if tiers.values == "host" and cuda:
        return segment.place(Tensor.pin_memory)
    if tiers.values == "host" and segment.mapped:
        return segment.place(Tensor.clone)
    return segment
