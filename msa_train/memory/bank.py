"""MemoryBank: any number of encoded documents, found by routing keys and read by their pooled keys and values.

Two sides of the same documents. Segments hold everything, in host memory or mapped from files; blocks hold the routing
keys, on the device that searches, many segments to a block where they are copied there. The invariant: a document's
part depends on nothing but the document, so what a query finds and reads does not depend on the order in which
documents came, on removed ones, or on how the bank is cut; a number is a document's for ever and is not given again.

Shapes: D documents, C chunks, Q queries, X routing tokens, G key/value heads, W head width, L routed layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msa_train.errors import UserError
from msa_train.memory.blocks import TILE, Block, Tiers, blocks_of, placed
from msa_train.memory.layer import BankLayer
from msa_train.memory.room import check_room_on
from msa_train.memory.segment import BankShape, Segment, join_keys
from msa_train.search import Found, Tile, rank, search

Keep = Callable[[Tensor], Tensor]  # numbers [D] -> which of them can be found, bool [D]


class MemoryBank:
    """Encoded documents. `Encoder.bank` makes one, `BankFolder.open` opens one.

    Args:
        shape: Who encoded it, and in which sizes.
        segments: The documents.
        device: Where queries come from.
        tiers: Where it is kept.
        next_number: The number of the next document; by default the one behind the last.
    """

    def __init__(
        self,
        shape: BankShape,
        segments: Iterable[Segment] = (),
        device: torch.device | str = "cpu",
        tiers: Tiers = Tiers(),
        next_number: int | None = None,
    ) -> None:
        self.shape, self.device, self.tiers = shape, torch.device(device), tiers
        self.versions: dict[Path, str] = {}  # of every folder that held this bank: digest of its manifest then
        self.segments: tuple[Segment, ...] = ()
        self.blocks: tuple[Block, ...] = ()
        self.next_number = 1
        self._extend(list(segments))
        self.next_number = max(self.next_number, next_number or 1)

    # --- what is in it ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Documents that can be found."""
        return len(self._places[0])

    @property
    def chunks(self) -> int:
        """Chunks that can be found."""
        return sum(int(segment.chunk_offsets_D.diff()[segment.live_D].sum()) for segment in self.segments)

    @property
    def tokens(self) -> int:
        """Tokens of the documents that can be found."""
        return sum(int(segment.tokens_D[segment.live_D].sum()) for segment in self.segments)

    def numbers(self) -> list[int]:
        """Numbers of all documents, ascending."""
        return self._places[0].tolist()

    def __contains__(self, number: int) -> bool:
        return self._find(number) is not None

    def has(self, name: str) -> bool:
        """Whether there is a document of this name."""
        return name in self._names

    def names(self) -> list[str]:
        """Names of all documents."""
        return list(self._names)

    def id(self, number: int) -> str:
        """Name of the document with this number."""
        segment, row = self._at(number)
        return segment.ids[row]

    def source(self, number: int) -> str:
        """Name of the document that the one with this number is a part of; its own where it is whole."""
        segment, row = self._at(number)
        return segment.source(row)

    def text(self, number: int) -> str:
        """Words of the document with this number."""
        segment, row = self._at(number)
        return segment.texts[row]

    def number(self, name: str) -> int:
        """Number of the document of this name.

        Raises:
            UserError: There is none.
        """
        if name not in self._names:
            raise UserError(f"the bank has no document '{name}'")
        return self._names[name]

    # --- changing it --------------------------------------------------------------------------------------------

    def add(self, segments: Iterable[Segment]) -> None:
        """Takes in newly encoded documents, under new numbers.

        Raises:
            UserError: A name is taken: two documents may not share one. Nothing is added then.
        """
        new: list[Segment] = []
        names: set[str] = set()
        for segment in segments:
            assert bool((segment.number_D >= self.next_number).all()), "a number is given once"
            for name in segment.ids:
                if name in names or self.has(name):
                    raise UserError(f"document '{name}' is in the bank already: replace it, or give another name")
                names.add(name)
            new.append(segment)
        self._extend(new)

    def remove(self, names: Iterable[str]) -> None:
        """Takes documents out; no other one is touched.

        Raises:
            UserError: A name is not there; nothing is removed then.
        """
        self._without([self.number(name) for name in names])

    def replace(self, segments: Iterable[Segment]) -> None:
        """Puts newly encoded documents in the place of those with the same numbers and names."""
        new = list(segments)
        numbers = [number for segment in new for number in segment.number_D.tolist()]
        assert numbers == [self.number(name) for segment in new for name in segment.ids]
        self._without(numbers)
        self._extend(new)

    def hold(self, segments: Iterable[Segment]) -> None:
        """Keeps its documents in other segments, which hold the same."""
        self.segments = tuple(placed(segment, self.device, self.tiers) for segment in segments)
        self._forget()

    # --- parts of it --------------------------------------------------------------------------------------------

    def upto(self, number: int) -> MemoryBank:
        """The documents numbered up to `number`: one encoding serves every smaller memory. Nothing is copied."""
        blocks = []
        for block in self.blocks:
            last = int(torch.searchsorted(block.number_D.cpu(), number, right=True))
            if last:
                blocks.append(block.slice(0, last))
        return self._view(blocks, lambda number_D: number_D <= number)

    def only(self, numbers: Iterable[int]) -> MemoryBank:
        """These documents alone. Nothing is copied."""
        chosen = torch.tensor(sorted(set(numbers)), dtype=torch.int64)

        def keep(number_D: Tensor) -> Tensor:
            return torch.isin(number_D, chosen.to(number_D.device))

        return self._view(_marked(self.blocks, keep), keep)

    def overlaid(self, segments: Iterable[Segment], hidden: Iterable[int]) -> MemoryBank:
        """This bank with other documents in the place of some. Of its own documents, nothing is copied.

        Args:
            segments: The other documents, newly encoded.
            hidden: Numbers of this bank that are not to be found: those of the others, wherever they are kept.
        """
        gone = torch.tensor(sorted(set(hidden)), dtype=torch.int64)

        def keep(number_D: Tensor) -> Tensor:
            return ~torch.isin(number_D, gone.to(number_D.device))

        view = self._view(_marked(self.blocks, keep), keep)
        view._extend(list(segments))
        return view

    def share(self, rank: int, world: int) -> MemoryBank:
        """One of `world` parts of like many chunks: consecutive documents. Nothing large is copied on a CPU.

        A part is at most the longest document larger than an even share.
        """
        total, before, parts = max(self.chunks, 1), 0, []
        for segment in self.segments:
            end_D = (segment.chunk_offsets_D.diff() * segment.live_D).cumsum(0)
            start_D = before + torch.cat([end_D.new_zeros(1), end_D[:-1]])
            mine = ((start_D * world // total == rank) & segment.live_D).nonzero().flatten().tolist()
            if mine:
                parts.append(segment.slice(mine[0], mine[-1] + 1))
            before += int(end_D[-1])
        return MemoryBank(self.shape, parts, self.device, self.tiers, self.next_number)

    def to(self, device: torch.device | str, tiers: Tiers = Tiers()) -> MemoryBank:
        """The same documents, kept elsewhere; of a bank on disk, or a share of one, no more is read than is kept.

        Args:
            device: Where queries will come from.
            tiers: Where it is kept.

        Raises:
            UserError: It does not fit on the device.
        """
        check_room_on(torch.device(device), tiers, self.shape, sum(segment.chunks for segment in self.segments))
        bank = MemoryBank(self.shape, self.segments, device, tiers, self.next_number)
        bank.versions = dict(self.versions)
        return bank

    # --- finding and reading ------------------------------------------------------------------------------------

    def layers(self, excluded: Sequence[Sequence[int]] | None = None) -> list[BankLayer]:
        """The bank as every routed layer sees it, for `MemorySparseModel.consult`.

        Args:
            excluded: Numbers that each query must not get.
        """
        return [BankLayer(self, layer, excluded) for layer in range(len(self.shape.layers))]

    def tiles(self, layer: int) -> Iterator[Tile]:
        """Routing keys of a layer, a tile at a time, on the device."""
        for block in self.blocks:
            for first, last in block.cuts(TILE.get(self.device.type, TILE["cuda"])):
                yield block.tile(layer, first, last).to(self.device, non_blocking=True)

    def search(
        self,
        layer: int,
        query_XR: Tensor,
        offsets_Q: Tensor,
        heads: int,
        k: int,
        excluded: Sequence[Sequence[int]] | None = None,
    ) -> Found:
        """The k best documents of each query in one layer; equal scores go to the lower number.

        Args:
            layer: Place of the layer among the routed ones.
            query_XR: q~ of the routing tokens, query after query, float32.
            offsets_Q: Where each query's tokens begin, Q + 1 values, int64.
            heads: H.
            k: Documents per query.
            excluded: Numbers that each query must not get.
        """
        return search(self.tiles(layer), query_XR, offsets_Q, heads, k, excluded)

    def rank(
        self,
        query_LXR: Sequence[Tensor],
        offsets_Q: Tensor,
        weights: Sequence[float],
        heads: int,
        k: int,
        excluded: Sequence[Sequence[int]] | None = None,
        among: Sequence[int] | None = None,
    ) -> Found:
        """The k best documents of each query by the weighted mean of their scores over layers.

        Args:
            query_LXR: q~ of every routed layer.
            offsets_Q: Where each query's tokens begin.
            weights: One per routed layer.
            heads: H.
            k: Documents per query.
            excluded: Numbers that each query must not get.
            among: Numbers of a few documents to rank alone.
        """
        layers = range(len(self.shape.layers))
        tiles = [self.tiles(layer) if among is None else self._tile(layer, among) for layer in layers]
        return rank(tiles, query_LXR, offsets_Q, weights, heads, k, excluded)

    def read(self, layer: int, numbers: Sequence[int]) -> tuple[list[int], Tensor, Tensor]:
        """Pooled keys and values of documents.

        Args:
            layer: Place of the layer among the routed ones.
            numbers: The documents, each in the bank.

        Returns:
            Chunks of each, and their keys and values [C, G, W], in order, on the device.
        """
        counts, keys, values = [], [], []
        for segment, first, last in map(self._span, numbers):
            counts.append(last - first)
            keys.append(segment.layers[layer].key_CGW[first:last])
            values.append(segment.layers[layer].value_CGW[first:last])
        if not counts:
            nothing = torch.empty(0, self.shape.groups, self.shape.width, dtype=self.shape.torch_dtype)
            keys, values = [nothing], [nothing]
        key_CGW, value_CGW = (torch.cat(parts).to(self.device, non_blocking=True) for parts in (keys, values))
        return counts, key_CGW, value_CGW

    # --- helpers ------------------------------------------------------------------------------------------------

    def _tile(self, layer: int, numbers: Sequence[int]) -> list[Tile]:
        """These documents as one tile."""
        numbers = sorted(set(numbers))
        counts, keys = [], []
        for segment, first, last in map(self._span, numbers):
            counts.append(last - first)
            keys.append(segment.layers[layer].keys.rows(first, last))
        if not counts:
            return []
        owner_C = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        return [Tile(join_keys(keys), owner_C, torch.tensor(numbers)).to(self.device)]

    def _extend(self, segments: Sequence[Segment]) -> None:
        segments = [placed(segment, self.device, self.tiers) for segment in segments if segment.documents]
        self.blocks += tuple(blocks_of(segments, self.device if self.tiers.router_keys == "device" else None))
        self.segments += tuple(segments)
        last = max((int(segment.number_D[-1]) for segment in segments), default=0)
        self.next_number = max(self.next_number, last + 1)
        self._forget()

    def _without(self, numbers: Sequence[int]) -> None:
        gone = torch.tensor(sorted(numbers), dtype=torch.int64)

        def keep(number_D: Tensor) -> Tensor:
            return ~torch.isin(number_D, gone.to(number_D.device))

        self.segments, self.blocks = _marked(self.segments, keep), _marked(self.blocks, keep)
        self._forget()

    def _view(self, blocks: Sequence[Block], keep: Keep) -> MemoryBank:
        view = MemoryBank(self.shape, (), self.device, self.tiers, self.next_number)
        view.segments = _marked(self.segments, keep)
        view.blocks = tuple(blocks)
        return view

    def _forget(self) -> None:
        for name in ("_places", "_names"):
            self.__dict__.pop(name, None)

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of all documents, ascending; the segment and row of each."""
        numbers, segments, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for place, segment in enumerate(self.segments):
            row = segment.live_D.nonzero().flatten().numpy()
            numbers.append(segment.number_D.numpy()[row])
            segments.append(np.full(len(row), place))
            rows.append(row)
        number, order = np.concatenate(numbers), np.argsort(np.concatenate(numbers), kind="stable")
        assert (np.diff(number[order]) > 0).all(), "two documents with one number"
        return number[order], np.concatenate(segments)[order], np.concatenate(rows)[order]

    @cached_property
    def _names(self) -> dict[str, int]:
        names: dict[str, int] = {}
        for segment in self.segments:
            numbers = segment.number_D.tolist()
            for row in segment.live_D.nonzero().flatten().tolist():
                names[segment.ids[row]] = numbers[row]
        return names

    def _find(self, number: int) -> tuple[Segment, int] | None:
        number_D, segment_D, row_D = self._places
        place = int(np.searchsorted(number_D, number))
        if place == len(number_D) or number_D[place] != number:
            return None
        return self.segments[segment_D[place]], int(row_D[place])

    def _span(self, number: int) -> tuple[Segment, int, int]:
        """The segment of a document, and its chunks there."""
        segment, row = self._at(number)
        first, last = segment.chunk_offsets_D[row : row + 2].tolist()
        return segment, first, last

    def _at(self, number: int) -> tuple[Segment, int]:
        found = self._find(number)
        if found is None:
            raise unknown(number)
        return found


Marked = TypeVar("Marked", Segment, Block)


def _marked(parts: Iterable[Marked], keep: Keep) -> tuple[Marked, ...]:
    """Segments or blocks of which only these documents can be found."""
    return tuple(replace(part, live_D=part.live_D & keep(part.number_D)) for part in parts)


def unknown(number: int) -> UserError:
    """What asking for a number raises that is no document's."""
    return UserError(f"the bank has no document with the number {number}")
