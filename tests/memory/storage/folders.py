"""Looks at a bank's folder: what is written in it, and whether all of it can be read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from msa_train.errors import UserError
from msa_train.kernels.maxsim import RoutingKeys
from msa_train.memory import BankFolder, MemoryBank, storage
from msa_train.memory.manifest import MANIFEST, UNFINISHED
from msa_train.memory.segment import LayerSegment, Segment
from msa_train.memory.strings import Strings, offsets_of
from tests.memory.banks import HEADS, K, queries

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, limits a process")


def files(folder: BankFolder) -> dict[str, tuple[int, int, int]]:
    """What is in a folder, but for its lock; a file that is written again is another one."""
    found = [file.stat() for file in sorted(folder.path.iterdir()) if file.name != storage.LOCK]
    names = [file.name for file in sorted(folder.path.iterdir()) if file.name != storage.LOCK]
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in zip(names, found, strict=True)}


def written(folder: BankFolder, act: Callable[[], object]) -> tuple[set[str], set[str]]:
    """Files that an act writes, and those that it deletes."""
    before = files(folder)
    act()
    after = files(folder)
    assert {name for name in after if name.startswith("segment-")} == listed(folder)
    return {name for name in after if after[name] != before.get(name)}, before.keys() - after.keys()


def listed(folder: BankFolder) -> set[str]:
    return {record["file"] for record in folder.manifest()["segments"]}


def verified(folder: BankFolder) -> int:
    """Bytes that were found good."""
    return sum(size for _, size in folder.verify())


def opens(folder: BankFolder) -> MemoryBank:
    """Opens a bank and looks at everything in it."""
    bank = folder.open()
    query_LXR, offsets_Q = queries(bank)
    for layer, query_XR in enumerate(query_LXR):
        found = bank.search(layer, query_XR, offsets_Q, HEADS, K)
        bank.read(layer, sorted(set(found.number_QK[found.number_QK >= 0].tolist())))
    bank.rank(query_LXR, offsets_Q, [1, 2], HEADS, K, among=bank.numbers()[:3])
    for number in bank.numbers():
        bank.id(number), bank.text(number)
    assert not bank.has("nobody")
    bank.read(0, bank.numbers())
    assert bank.tokens >= len(bank) and len(bank.share(1, 3)) <= len(bank)
    list(folder.verify())
    return bank


def refused(folder: BankFolder, *named: str) -> str:
    with pytest.raises(UserError) as told:
        opens(folder)
    assert "\n" not in str(told.value) and all(name in str(told.value) for name in named), str(told.value)
    return str(told.value)


def finished(folder: BankFolder) -> list[int]:
    """Documents of each segment of an encoding that was broken off."""
    file = folder.path / UNFINISHED
    return [record["documents"] for record in json.loads(file.read_text())["segments"]] if file.exists() else []


def large_bank(bank: MemoryBank, chunks: int) -> MemoryBank:
    """One document of many chunks."""
    shape = bank.shape
    layers = tuple(
        LayerSegment(
            RoutingKeys(torch.randn(chunks, shape.groups * shape.width)),
            torch.randn(chunks, shape.groups, shape.width),
            torch.randn(chunks, shape.groups, shape.width),
        )
        for _ in shape.layers
    )
    lengths = torch.tensor([1, chunks - 1])
    ids, texts = Strings.of(["small", "large"]), Strings.of(["few", "many"])
    tokens, whole = lengths * shape.chunk_size, torch.tensor([5, 5], dtype=torch.int32)
    numbers, live = torch.tensor([1, 2]), torch.ones(2) > 0
    return MemoryBank(shape, [Segment(numbers, tokens, offsets_of(lengths), ids, whole, texts, layers, live)])


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for name in path[:-1]:
            manifest = manifest[name]
        manifest[path[-1]] = value

    return change


def rewrite(folder: BankFolder, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder.path / MANIFEST
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
