"""A bank on disk: one safetensors file per segment, and a manifest (manifest.py) that says which of them are the bank.

Files are written aside and renamed, and never changed after that; the manifest is replaced last, in one step, and by
one process at a time. So the invariant: at every moment the folder holds a whole bank, the old one or the new one,
whatever breaks off the writing; and nobody's change is lost, since only the bank that the folder holds can be changed.
Files are mapped, not read: opening costs the same for any size, and no byte is taken on trust (names, sizes and types
are checked; `verify` reads everything and compares checksums). Nothing is unpickled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from msa_train.errors import UserError
from msa_train.memory.bank import MemoryBank
from msa_train.memory.blocks import Tiers
from msa_train.memory.encoding import Encoder
from msa_train.memory.files import ASIDE, checksum, counts_of, disk_errors, read_segment, write_segment, write_text
from msa_train.memory.manifest import (
    MANIFEST,
    SEGMENT_FILE,
    UNFINISHED,
    manifest_text,
    read_manifest,
    shape_of,
    told_of,
    version_of,
)
from msa_train.memory.retracing import Retraced
from msa_train.memory.room import check_room_on
from msa_train.memory.segment import BankShape, Passage, Segment

LOCK = ".lock"
STALE = 4  # a segment is written anew without its removed documents once they are a quarter of its chunks


class BankFolder:
    """The folder of a bank.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = FileLock(self.path / LOCK, timeout=0)

    def exists(self) -> bool:
        """Whether a whole bank is there."""
        return os.path.isfile(self.path / MANIFEST)

    def open(self, device: torch.device | str = "cpu", tiers: Tiers = Tiers(values="disk")) -> MemoryBank:
        """Opens the bank lazily.

        Args:
            device: Where queries will come from.
            tiers: Where it is kept; by default pooled keys and values stay in the files' memory map.

        Raises:
            UserError: There is none, it is of another format, damaged (the file is named), or too large for the device.
        """
        manifest = self.manifest()
        try:
            segments = self._segments(manifest)
        except UserError:
            if self.manifest() == manifest:
                raise
            return self.open(device, tiers)  # it was saved anew while its old files were opened
        shape = shape_of(manifest)
        check_room_on(torch.device(device), tiers, shape, manifest["chunks"])
        bank = MemoryBank(shape, segments, device, tiers, manifest["next_number"])
        bank.versions[self.path.resolve()] = version_of(manifest)
        return bank

    def manifest(self) -> dict[str, Any]:
        """What the bank says of itself (manifest.py).

        Raises:
            UserError: There is no bank, or its manifest is damaged or of another format.
        """
        if not self.exists():
            hint = ": its encoding was broken off; run `msa-train encode` again" if self._goes_on() else ""
            raise UserError(f"{self.path} is no memory bank (no {MANIFEST}){hint}")
        return read_manifest(self.path / MANIFEST)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other processes from changing the bank. `save` and `encode` do so themselves; a change that takes long
        can hold the folder from its beginning.

        Raises:
            UserError: Another process is changing it, or the folder cannot be made or holds something else.
        """
        self._claim()
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                held = self._lock.acquire()
            except Timeout as error:
                raise UserError(f"{self.path}: another process is writing here: wait until it is done") from error
        with held:
            yield

    def save(self, bank: MemoryBank, **told: str) -> None:
        """Makes the folder hold this bank. Segments that it holds already are not written again.

        Args:
            bank: The bank: a new one, or the one that was opened from or saved in this folder last.
            told: Further entries for the manifest.

        Raises:
            UserError: The folder holds something else, another bank or a change of another process, or the disk is
                full; what was there is still there then.
        """
        with self.writing():
            kept = self._replaceable(bank)
            known = {record["file"]: record for record in kept.get("segments", [])}
            records, segments = [], []
            try:
                for segment in bank.segments:
                    if _stale(segment):
                        segment = segment.compact()
                    if segment.documents:
                        record = known.get(segment.file or "") or write_segment(self.path, segment, bank.shape)
                        records.append({**record, **counts_of(segment)})
                        segments.append(replace(segment, file=record["file"]))
                text = manifest_text(bank.shape, records, bank.next_number, {**told_of(kept), **told})
                write_text(self.path / MANIFEST, text)
            finally:
                self._sweep()
            bank.hold(segments)
            bank.versions[self.path.resolve()] = version_of(self.manifest())

    def encode(self, encoder: Encoder, passages: Iterable[Passage], **told: str) -> None:
        """Encodes documents into a new bank, a segment at a time; goes on where an earlier attempt broke off.

        Args:
            encoder: The encoder.
            passages: The documents; what the earlier attempt encoded of the same ones is kept.
            told: Further entries for the manifest.

        Raises:
            UserError: The folder holds a bank already, or the disk is full; what is done stays for the next attempt.
        """
        with self.writing():
            if self.exists():
                raise UserError(
                    f"{self.path} holds a bank already: `msa-train bank` adds to it; or give another folder"
                )
            stream = Retraced(encoder.numbered(passages))
            records: list[dict[str, Any]] = []
            for record in self._unfinished(encoder.shape):
                if not stream.skip(record["documents"], record["input"]):
                    break
                records.append(record)
                encoder.advance(record["tokens"])
            for segment in encoder.encode(stream):
                done = {"input": stream.digest(segment.documents)}
                records.append({**write_segment(self.path, segment, encoder.shape), **counts_of(segment), **done})
                write_text(self.path / UNFINISHED, manifest_text(encoder.shape, records, 1))
            if not records:
                raise UserError("there is no document to encode")
            final = [{name: value for name, value in record.items() if name != "input"} for record in records]
            next_number = 1 + sum(record["documents"] for record in records)
            write_text(self.path / MANIFEST, manifest_text(encoder.shape, final, next_number, told))
            self._sweep()

    def written(self, shape: BankShape) -> int:
        """Bytes that an encoding which was broken off has written, and that one of this shape goes on with."""
        return sum(record["bytes"] for record in self._unfinished(shape))

    def change(
        self, encoder: Encoder, new: Iterable[Passage], changed: Iterable[Passage], gone: Iterable[str] = ()
    ) -> None:
        """Changes the bank that the folder holds, and saves each segment when it is encoded.

        So no more than two segments are in memory, and a change that is broken off leaves a whole bank, with a part of
        the documents changed; the rest can be given again.

        Args:
            encoder: The encoder.
            new: Documents to add.
            changed: Documents that take the place of those of their names.
            gone: Names of documents to remove, in the end.

        Raises:
            UserError: As in `Encoder.add`, `Encoder.replace`, `MemoryBank.remove` and `save`; what is done stays.
        """
        with self.writing():
            bank = self.open()
            added, replaced = encoder.added(bank, new), encoder.replaced(bank, changed)
            for segments, put in ((added, MemoryBank.add), (replaced, MemoryBank.replace)):
                for segment in segments:
                    put(bank, [segment])
                    self.save(bank)
                    bank = self.open()  # the segment lies in a map now
            bank.remove(gone)
            self.save(bank)

    def verify(self) -> Iterator[tuple[str, int]]:
        """Reads every file and compares it with its checksum; yields each one's name and bytes once it is found good.

        Raises:
            UserError: A file is missing or damaged; it is named.
        """
        manifest = self.manifest()
        self._segments(manifest)
        for record in manifest["segments"]:
            file = self.path / record["file"]
            if checksum(file) != record["sha256"]:
                raise UserError(f"{file}: damaged: its checksum is not the manifest's; encode the bank again")
            yield record["file"], record["bytes"]

    # --- helpers ------------------------------------------------------------------------------------------------

    def _goes_on(self) -> bool:
        return os.path.isfile(self.path / UNFINISHED)

    def _claim(self) -> None:
        if self.exists() or self._goes_on() or not os.path.isdir(self.path):
            return
        with disk_errors(self.path):
            found = sorted(file.name for file in self.path.iterdir())
        for name in found:
            if name != LOCK and not name.startswith(ASIDE) and not SEGMENT_FILE.fullmatch(name):
                raise UserError(f"{self.path} holds something that is no bank ('{name}'): give another folder")

    def _replaceable(self, bank: MemoryBank) -> dict[str, Any]:
        """The manifest that saving this bank replaces."""
        if not self.exists():
            if self._goes_on():
                raise UserError(f"{self.path} holds an encoding that was broken off: finish it, or give another folder")
            return {}
        manifest = self.manifest()
        if bank.versions.get(self.path.resolve()) != version_of(manifest):
            raise UserError(
                f"{self.path} holds another bank, or was changed since this one was opened: open it again, or give "
                "another folder"
            )
        return manifest

    def _unfinished(self, shape: BankShape) -> Iterator[dict[str, Any]]:
        """What an earlier attempt finished, as far as it is whole."""
        if not self._goes_on():
            return
        try:
            manifest = read_manifest(self.path / UNFINISHED)
            for record in manifest["segments"] if shape_of(manifest) == shape else []:
                read_segment(self.path, record, shape)
                yield {"input": "", **record}
        except UserError:
            return  # nothing is lost but time: what is damaged is encoded anew

    def _segments(self, manifest: dict[str, Any]) -> list[Segment]:
        segments = [read_segment(self.path, record, shape_of(manifest)) for record in manifest["segments"]]
        numbers = torch.cat([torch.zeros(1, dtype=torch.int64), *(one.number_D[one.live_D] for one in segments)])
        if len(numbers.unique()) < len(numbers) or int(numbers.max()) >= manifest["next_number"]:
            raise UserError(f"{self.path / MANIFEST}: damaged: a number is given twice; encode the bank again")
        return segments

    def _sweep(self) -> None:
        """Deletes what the bank does not list: leftovers of what was broken off."""
        listed = {record["file"] for record in self.manifest()["segments"]} if self.exists() else set()
        (self.path / UNFINISHED).unlink(missing_ok=True)
        for file in list(self.path.iterdir()):
            if SEGMENT_FILE.fullmatch(file.name) and file.name not in listed:
                file.unlink()
            elif file.name.startswith(ASIDE):
                shutil.rmtree(file)


def _stale(segment: Segment) -> bool:
    gone = int(segment.chunk_offsets_D.diff()[~segment.live_D].sum())
    return gone > 0 and gone * STALE >= segment.chunks
