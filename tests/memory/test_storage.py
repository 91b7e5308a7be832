"""A bank's folder: what is saved is what is opened, whatever breaks off the writing and whatever a file holds."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from msa_train.errors import UserError
from msa_train.kernels.maxsim import Precision, RoutingKeys
from msa_train.memory import BankFolder, Encoder, MemoryBank, Passage, Tiers, encoding, storage
from msa_train.memory import files as files_of
from msa_train.memory.manifest import MANIFEST, UNFINISHED
from msa_train.memory.room import check_room, gib
from msa_train.memory.segment import LayerSegment, Segment
from msa_train.memory.strings import Strings, offsets_of
from msa_train.model import MemorySparseModel
from msa_train.protocol import Protocol
from tests.memory.banks import HEADS, PRECISIONS, K, assert_same, assert_same_answers, queries
from tests.memory.conftest import passages

Call = Callable[..., Any]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, limits a process")
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "SEGMENT_BYTES", 6000)


@pytest.fixture
def folder(tmp_path: Path, encoder: Encoder, protocol: Protocol) -> BankFolder:
    """A bank of nineteen documents in several files."""
    folder = BankFolder(tmp_path / "bank")
    folder.encode(encoder, passages(protocol, range(19)), corpus="animals")
    return folder


@pytest.fixture
def wanted(encoder: Encoder, protocol: Protocol) -> MemoryBank:
    """What that folder holds."""
    return encoder.bank(passages(protocol, range(19)))


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


# --- saved and opened -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_saved_is_what_is_opened(
    model: MemorySparseModel, protocol: Protocol, precision: Precision, dtype: torch.dtype, tmp_path: Path
) -> None:
    bank = Encoder(model, protocol, precision).bank(passages(protocol, range(11)))
    bank = MemoryBank(
        replace(bank.shape, dtype=str(dtype)[6:]), [one.place(lambda t: t.to(dtype)) for one in bank.segments]
    )
    bank.remove(["d4"])
    folder = BankFolder(tmp_path)
    folder.save(bank, corpus="animals")
    opened = folder.open()
    assert len(opened.segments) > 2 and opened.shape == bank.shape and opened.next_number == 12
    assert_same(opened, bank)
    assert verified(folder) == sum(size for name, (_, _, size) in files(folder).items() if name != MANIFEST)
    assert folder.manifest()["corpus"] == "animals"
    assert (folder.manifest()["documents"], folder.manifest()["tokens"]) == (10, bank.tokens)


def test_encoding_into_a_folder_is_saving_the_bank(
    folder: BankFolder, wanted: MemoryBank, encoder: Encoder, tmp_path: Path
) -> None:
    other = BankFolder(tmp_path / "other")
    other.save(wanted, corpus="animals")
    assert_same(folder.open(), wanted)
    assert folder.manifest() == other.manifest() and folder.open().next_number == 20


def test_others_may_read_a_bank(folder: BankFolder) -> None:
    """Left to itself, safetensors lets nobody but the owner."""
    modes = {file.suffix: file.stat().st_mode & 0o777 for file in folder.path.iterdir()}
    assert modes[".safetensors"] == modes[".json"]


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
    tokens = lengths * shape.chunk_size
    return MemoryBank(
        shape, [Segment(torch.tensor([1, 2]), tokens, offsets_of(lengths), ids, texts, layers, torch.ones(2) > 0)]
    )


@linux
def test_opening_reads_no_tensor(wanted: MemoryBank, tmp_path: Path) -> None:
    folder = BankFolder(tmp_path)
    folder.save(large_bank(wanted, 200_000))
    (size,) = (file.stat().st_size for file in tmp_path.glob("segment-*"))
    assert size > 70_000_000

    def resident() -> int:
        """Bytes of the bank's files that were brought into this process."""
        total, ours = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                ours = str(tmp_path) in line
            elif ours and line.startswith("Rss:"):
                total += 1024 * int(line.split()[1])
        return total

    bank = folder.open()
    assert bank.id(1) == "small"
    bank.read(0, [1])
    assert resident() < size // 8
    query_LXR, offsets_Q = queries(bank)
    assert bank.search(0, query_LXR[0], offsets_Q, HEADS, K).number_QK[0, :3].tolist() == [2, 1, -1]
    assert resident() > size // 8, "a search reads the keys"


def test_a_bank_outlives_its_files(folder: BankFolder, wanted: MemoryBank) -> None:
    bank = folder.open()
    for file in folder.path.iterdir():
        file.unlink()
    assert_same(bank, wanted)


# --- what is written again --------------------------------------------------------------------------------------------


def test_saving_again_writes_no_segment(folder: BankFolder, wanted: MemoryBank, tmp_path: Path) -> None:
    bank = folder.open()
    for _ in range(2):
        assert written(folder, lambda: folder.save(bank)) == ({MANIFEST}, set())
    fresh = BankFolder(tmp_path / "fresh")
    fresh.save(wanted)
    assert written(fresh, lambda: fresh.save(wanted)) == ({MANIFEST}, set())
    assert_same(fresh.open(), wanted)


def test_adding_writes_the_new_segment_alone(
    folder: BankFolder, wanted: MemoryBank, encoder: Encoder, protocol: Protocol
) -> None:
    bank = folder.open()
    for one in (bank, wanted):
        encoder.add(one, passages(protocol, [40]))
    (new, *more), gone = written(folder, lambda: folder.save(bank))
    assert sorted([new, *more])[0] == MANIFEST and len(more) == 1 and not gone
    assert_same(folder.open(), wanted)
    assert written(folder, lambda: folder.save(bank)) == ({MANIFEST}, set())
    assert folder.manifest()["corpus"] == "animals" and folder.manifest()["next_number"] == 21


def test_a_few_removed_documents_stay_in_their_file(folder: BankFolder, wanted: MemoryBank) -> None:
    bank = folder.open()
    sizes = [segment.chunk_offsets_D.diff() for segment in bank.segments]
    few = next(
        (place, row) for place, size in enumerate(sizes) for row in range(len(size)) if size[row] * 4 < size.sum()
    )
    name = bank.segments[few[0]].ids[few[1]]
    for one in (bank, wanted):
        one.remove([name])
    assert written(folder, lambda: folder.save(bank)) == ({MANIFEST}, set())
    assert sum(len(record["removed"]) for record in folder.manifest()["segments"]) == 1
    assert_same(folder.open(), wanted)
    assert not folder.open().has(name) and verified(folder) > 0


def test_a_file_of_many_removed_documents_is_written_without_them(folder: BankFolder, wanted: MemoryBank) -> None:
    """Of the second file all but one document goes, of the third all."""
    bank = folder.open()
    names = [*list(bank.segments[1].ids)[1:], *bank.segments[2].ids]
    assert len(names) > 2
    for one in (bank, wanted):
        one.remove(names)
    old = [segment.file for segment in bank.segments]
    before = {name: size for name, (_, _, size) in files(folder).items()}
    new, gone = written(folder, lambda: folder.save(bank))
    assert gone == {old[1], old[2]} and len(new) == 2
    (slim,) = new - {MANIFEST}
    assert files(folder)[slim][2] < before[str(old[1])]
    assert all(record["removed"] == [] for record in folder.manifest()["segments"])
    assert_same(folder.open(), wanted)
    assert_same(bank, wanted)
    written_again, gone = written(folder, lambda: folder.save(bank))
    assert not gone and written_again == {slim, MANIFEST}, "the bank in memory still has the old segment"


def test_every_change_survives_saving(
    folder: BankFolder, wanted: MemoryBank, encoder: Encoder, protocol: Protocol
) -> None:
    for remove, replace_, add in (([3, 4, 5, 6], [1, 17], [50, 51]), ([50, 0], [51, 2], [3, 0]), ([2, 3], [0], [60])):
        bank = folder.open()
        for one in (bank, wanted):
            one.remove(f"d{number}" for number in remove)
            encoder.replace(one, passages(protocol, replace_, changed=f" Changed {add}."))
            encoder.add(one, passages(protocol, add))
        folder.save(bank)
        assert_same(folder.open(), wanted)
        assert folder.open().next_number == wanted.next_number
    assert wanted.next_number == 25 and verified(folder) > 0


def test_a_part_of_a_bank_can_be_saved_elsewhere_and_not_over_it(folder: BankFolder, tmp_path: Path) -> None:
    bank = folder.open()
    for place, part in enumerate((bank.share(1, 3), bank.upto(7), bank.only([2, 18]))):
        other = BankFolder(tmp_path / str(place))
        other.save(part)
        assert_same(other.open(), part)
        with pytest.raises(UserError, match="holds another bank"):
            folder.save(part)
    assert len(folder.open()) == 19


def test_an_empty_bank_is_saved_and_opened(folder: BankFolder) -> None:
    bank = folder.open()
    bank.remove(f"d{number}" for number in range(19))
    folder.save(bank)
    assert len(folder.open()) == 0 and folder.open().next_number == 20 and files(folder).keys() == {MANIFEST}


# --- an encoding that is broken off -----------------------------------------------------------------------------------


class Broken(Exception):
    """What breaks it off."""


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of all documents that are encoded from now on."""
    encoded: list[str] = []
    honest = Encoder._encode

    def count(self: Encoder, batch: list[Any], shape: Any) -> Segment:
        encoded.extend(passage.id for _, passage, _ in batch)
        return honest(self, batch, shape)

    monkeypatch.setattr(Encoder, "_encode", count)
    return encoded


def breaking(documents: list[Passage], after: int, error: BaseException | None = None) -> Iterator[Passage]:
    yield from documents[:after]
    raise error or Broken


def finished(folder: BankFolder) -> list[int]:
    """Documents of each segment of an encoding that was broken off."""
    file = folder.path / UNFINISHED
    return [record["documents"] for record in json.loads(file.read_text())["segments"]] if file.exists() else []


@pytest.mark.parametrize("after", [0, 1, 5, 12, 19])
@pytest.mark.parametrize("error", [Broken(), KeyboardInterrupt(), OSError(errno.EIO, "the corpus' disk")], ids=repr)
def test_a_broken_off_encoding_goes_on(
    encoder: Encoder, protocol: Protocol, wanted: MemoryBank, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    after: int, error: BaseException,
) -> None:  # fmt: skip
    documents, folder, encoded = passages(protocol, range(19)), BankFolder(tmp_path), counting(monkeypatch)
    with pytest.raises(type(error)):
        folder.encode(encoder, breaking(documents, after, error))
    done = sum(finished(folder))
    assert after - 4 < done <= after and not folder.exists()
    with pytest.raises(UserError, match="no memory bank"):
        folder.open()
    encoded.clear()
    told: list[int] = []
    monkeypatch.setattr(encoder, "advance", told.append)
    folder.encode(encoder, iter(documents), corpus="animals")
    assert encoded == [document.id for document in documents[done:]]
    assert sum(told) == wanted.tokens
    assert_same(folder.open(), wanted)
    assert files(folder).keys() == {MANIFEST, *listed(folder)} and verified(folder) > 0
    uninterrupted = BankFolder(tmp_path / "uninterrupted")
    uninterrupted.encode(encoder, documents, corpus="animals")
    assert uninterrupted.manifest() == folder.manifest()


@pytest.mark.parametrize("after", [3, 9])
def test_a_failing_model_loses_no_finished_segment(
    encoder: Encoder,
    protocol: Protocol,
    wanted: MemoryBank,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    after: int,
) -> None:
    documents, folder = passages(protocol, range(19)), BankFolder(tmp_path)
    with monkeypatch.context() as patch:
        encoded = counting(patch)
        honest = Encoder._encode

        def failing(self: Encoder, batch: list[Any], shape: Any) -> Segment:
            if len(encoded) == after:
                raise torch.OutOfMemoryError
            return honest(self, batch, shape)

        patch.setattr(Encoder, "_encode", failing)
        with pytest.raises(torch.OutOfMemoryError):
            folder.encode(encoder, documents)
    done = sum(finished(folder))
    assert 0 < done <= after
    encoded = counting(monkeypatch)
    folder.encode(encoder, documents)
    assert encoded == [document.id for document in documents[done:]]
    assert_same(folder.open(), wanted)


def encode_and_die(model: MemorySparseModel, protocol: Protocol, path: Path, rename: int) -> None:
    """Killed while a file is about to get its name: its bytes lie aside."""
    encoding.SEGMENT_BYTES = 6000
    honest, renamed = Path.replace, [0]

    def die(self: Path, target: Path) -> Path:
        renamed[0] += 1
        if renamed[0] == rename:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(self, target)

    Path.replace = die  # type: ignore[assignment, method-assign]
    BankFolder(path).encode(Encoder(model, protocol, "float32"), passages(protocol, range(19)))


@pytest.mark.parametrize(("rename", "segments"), [(1, 0), (6, 2)])
def test_a_killed_encoding_goes_on(
    model: MemorySparseModel, encoder: Encoder, protocol: Protocol, wanted: MemoryBank,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rename: int, segments: int,
) -> None:  # fmt: skip
    """Killed at the very first file, and between the third segment and its entry."""
    child = mp.get_context("spawn").Process(target=encode_and_die, args=(model, protocol, tmp_path, rename))
    child.start()
    child.join(timeout=300)
    assert child.exitcode == -signal.SIGKILL
    folder, encoded = BankFolder(tmp_path), counting(monkeypatch)
    leftovers = {name for name in files(folder) if name.startswith(files_of.ASIDE)}
    assert len(leftovers) == 1 and len(finished(folder)) == segments
    done = sum(finished(folder))
    folder.encode(encoder, passages(protocol, range(19)))
    assert len(encoded) == 19 - done
    assert_same(folder.open(), wanted)
    assert files(folder).keys() == {MANIFEST, *listed(folder)}


@pytest.mark.parametrize("kind", ["order", "text", "id", "tokens", "fewer", "model"])
def test_other_documents_or_another_model_are_encoded_anew(
    model: MemorySparseModel, encoder: Encoder, protocol: Protocol, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    kind: str,
) -> None:  # fmt: skip
    """What came before the first difference is kept, a segment at a time."""
    documents, folder = passages(protocol, range(19)), BankFolder(tmp_path)
    with pytest.raises(Broken):
        folder.encode(encoder, breaking(documents, 15))
    sizes = finished(folder)
    assert len(sizes) >= 3
    place, kept = sizes[0] + 1, sizes[0]  # in the second segment
    if kind == "order":
        documents[place], documents[place - 1] = documents[place - 1], documents[place]
    elif kind == "text":
        documents[place] = replace(documents[place], text="Other words.")
    elif kind == "id":
        documents[place] = replace(documents[place], id="other")
    elif kind == "tokens":
        documents[place] = replace(documents[place], tokens=documents[place].tokens[:-1])
    elif kind == "fewer":
        documents = documents[: place + 1]
    else:
        trained = copy.deepcopy(model)
        trained.attention[0].modules.q_proj.weight.data += 0.5
        encoder, kept = Encoder(trained, protocol, "float32"), 0
    encoded = counting(monkeypatch)
    folder.encode(encoder, iter(documents))
    assert encoded == [document.id for document in documents[kept:]]
    assert_same(folder.open(), encoder.bank(documents))
    assert files(folder).keys() == {MANIFEST, *listed(folder)}


def test_a_name_that_comes_twice_is_found_after_an_interruption_too(
    encoder: Encoder, protocol: Protocol, tmp_path: Path
) -> None:
    folder = BankFolder(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match="two documents are named 'd0'"):
            folder.encode(encoder, passages(protocol, [*range(17), 0]))
        assert sum(finished(folder)) > 10 and not folder.exists()


@pytest.mark.parametrize("damage", ["missing", "cut", "garbage", "nested", "list", "entry"])
def test_what_is_damaged_of_a_broken_off_encoding_is_encoded_anew(
    encoder: Encoder, protocol: Protocol, wanted: MemoryBank, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    damage: str,
) -> None:  # fmt: skip
    documents, folder = passages(protocol, range(19)), BankFolder(tmp_path)
    with pytest.raises(Broken):
        folder.encode(encoder, breaking(documents, 15))
    sizes, file = finished(folder), tmp_path / UNFINISHED
    second = tmp_path / json.loads(file.read_text())["segments"][1]["file"]
    kept = sizes[0] if damage in ("missing", "cut") else 0
    if damage == "missing":
        second.unlink()
    elif damage == "cut":
        second.write_bytes(second.read_bytes()[:-9])
    else:
        wrong = {"garbage": "\x00{", "nested": "[" * 100_000, "list": "[]", "entry": '{"format": 1, "segments": [3]}'}
        file.write_text(wrong[damage])
    encoded = counting(monkeypatch)
    folder.encode(encoder, documents)
    assert len(encoded) == 19 - kept
    assert_same(folder.open(), wanted)
    assert files(folder).keys() == {MANIFEST, *listed(folder)}


def test_a_bank_is_not_encoded_over(folder: BankFolder, encoder: Encoder, protocol: Protocol) -> None:
    before = files(folder)
    with pytest.raises(UserError, match="holds a bank already"):
        folder.encode(encoder, passages(protocol, [70]))
    assert files(folder) == before


def test_an_encoding_that_can_go_on_is_not_saved_over(
    encoder: Encoder, protocol: Protocol, wanted: MemoryBank, tmp_path: Path
) -> None:
    folder = BankFolder(tmp_path)
    with pytest.raises(Broken):
        folder.encode(encoder, breaking(passages(protocol, range(19)), 15))
    before = files(folder)
    with pytest.raises(UserError, match="broken off: finish it"):
        folder.save(wanted)
    assert files(folder) == before


def test_no_document_is_no_bank(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no document to encode"):
        BankFolder(tmp_path).encode(encoder, [])
    assert not BankFolder(tmp_path).exists()


# --- a full disk, and two at once -------------------------------------------------------------------------------------


def failing_at(patch: pytest.MonkeyPatch, call: int, error: Exception) -> list[str]:
    """Lets one of all writes fail, counted from 1; returns the writes so far."""
    seen: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        honest = getattr(owner, name)

        def act(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            if len(seen) == call:
                raise error
            return honest(*arguments, **options)

        patch.setattr(owner, name, act)

    for owner, name in (
        (files_of, "save_file"), (Path, "write_text"), (os, "fsync"), (Path, "replace"), (Path, "touch"),
        (files_of, "TemporaryDirectory"),
    ):  # fmt: skip
        wrap(owner, name)
    return seen


FULL = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]


@pytest.mark.parametrize("error", FULL, ids=["OSError", "SafetensorError"])
def test_a_disk_that_is_full_at_any_write_leaves_the_old_bank(
    folder: BankFolder, wanted: MemoryBank, encoder: Encoder, protocol: Protocol, error: Exception
) -> None:
    """One segment is compacted, others are new: five writes for each, four for the manifest."""
    before, changed = files(folder), folder.open()
    changed.remove(list(changed.segments[1].ids)[1:])
    encoder.add(changed, passages(protocol, range(30, 36)))
    failures = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            seen = failing_at(patch, failures + 1, error)
            try:
                folder.save(changed)
                break
            except UserError as told:
                failures += 1
                assert str(folder.path) in str(told) and "No space left on device" in str(told)
                assert "\n" not in str(told) and len(seen) == failures
        assert files(folder) == before
        assert verified(folder) > 0
        assert_same(folder.open(), wanted)
    new = len(listed(folder) - before.keys())
    assert new >= 3 and failures == len(seen) == new * 5 + 4
    assert_same(folder.open(), changed)
    assert files(folder).keys() == {MANIFEST, *listed(folder)}


@pytest.mark.parametrize("error", FULL, ids=["OSError", "SafetensorError"])
def test_a_disk_that_is_full_at_any_write_of_an_encoding_keeps_what_is_done(
    encoder: Encoder, protocol: Protocol, wanted: MemoryBank, tmp_path: Path, error: Exception
) -> None:
    failures, folder, done = 0, BankFolder(tmp_path), 0
    for attempt in range(200):
        with pytest.MonkeyPatch.context() as patch:
            seen = failing_at(patch, 1 + attempt % 11, error)
            try:
                folder.encode(encoder, passages(protocol, range(19)))
                break
            except UserError as told:
                failures += 1
                assert str(folder.path) in str(told) and len(seen) == 1 + attempt % 11
        assert not any(name.startswith(files_of.ASIDE) for name in files(folder))
        assert sum(finished(folder)) >= done and not folder.exists()
        done = sum(finished(folder))
    assert failures > 9
    assert_same(folder.open(), wanted)
    assert files(folder).keys() == {MANIFEST, *listed(folder)}


def test_a_first_save_that_fails_leaves_no_file(wanted: MemoryBank, tmp_path: Path) -> None:
    folder = BankFolder(tmp_path / "new" / "bank")
    for call in (1, 4, 8, 12):
        with pytest.MonkeyPatch.context() as patch:
            failing_at(patch, call, FULL[0])
            with pytest.raises(UserError, match="No space left"):
                folder.save(wanted)
        assert files(folder) == {}
    folder.save(wanted)
    assert_same(folder.open(), wanted)


def save_elsewhere(path: Path, limit: int | None) -> None:
    """Exits with 3 where the bank could not be saved."""
    folder = BankFolder(path)
    opened = folder.open()
    bank = opened if limit is None else large_bank(opened, 50_000)
    bank.versions = opened.versions
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        folder.save(bank)
    except UserError:
        sys.exit(3)


def in_child(*arguments: Any) -> int | None:
    child = mp.get_context("spawn").Process(target=save_elsewhere, args=arguments)
    child.start()
    child.join(timeout=300)
    return child.exitcode


@linux
def test_a_real_limit_on_file_sizes_is_a_full_disk(folder: BankFolder, wanted: MemoryBank) -> None:
    before = files(folder)
    assert in_child(folder.path, 1_000_000) == 3
    assert files(folder) == before
    assert_same(folder.open(), wanted)


def test_a_change_that_another_made_is_not_lost(folder: BankFolder, encoder: Encoder, protocol: Protocol) -> None:
    mine, theirs = folder.open(), BankFolder(folder.path).open()
    encoder.add(theirs, passages(protocol, [41]))
    BankFolder(folder.path).save(theirs)
    encoder.add(mine, passages(protocol, [42]))
    before = files(folder)
    with pytest.raises(UserError, match="changed since this one was opened: open it again"):
        folder.save(mine)
    assert files(folder) == before
    mine = folder.open()
    encoder.add(mine, passages(protocol, [42]))
    folder.save(mine)
    opened = folder.open()
    assert opened.number("d41") == 20 and opened.number("d42") == 21
    encoder.replace(theirs, [])
    with pytest.raises(UserError, match="open it again"):
        folder.save(theirs)


def test_a_new_bank_does_not_take_anothers_place(folder: BankFolder, wanted: MemoryBank, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds another bank"):
        folder.save(wanted)
    other = BankFolder(tmp_path / "other")
    bank = folder.open()
    other.save(bank)
    folder.save(bank)
    other.save(bank)
    assert folder.manifest()["segments"] == other.manifest()["segments"]


def test_one_process_writes_at_a_time(folder: BankFolder, encoder: Encoder, protocol: Protocol) -> None:
    bank = folder.open()
    with BankFolder(folder.path).writing():
        with pytest.raises(UserError, match="another process is writing here"):
            folder.save(bank)
        with pytest.raises(UserError, match="another process is writing here"):
            folder.encode(encoder, passages(protocol, [3]))
        assert in_child(folder.path, None) == 3
        assert len(BankFolder(folder.path).open()) == 19, "reading needs no lock"
    with folder.writing():  # a change that takes long holds the folder from its beginning
        bank = folder.open()
        encoder.add(bank, passages(protocol, [40]))
        folder.save(bank)
    assert folder.open().has("d40")


def test_a_bank_that_is_saved_while_it_is_opened_is_opened_anew(
    folder: BankFolder, encoder: Encoder, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, honest = BankFolder(folder.path), storage.read_segment
    writer = other.open()
    writer.remove(list(writer.segments[1].ids))
    calls = [0]

    def meanwhile(*arguments: Any) -> Segment:
        calls[0] += 1
        if calls[0] == 1:
            other.save(writer)
        return honest(*arguments)

    monkeypatch.setattr(storage, "read_segment", meanwhile)
    assert_same(folder.open(), writer)


# --- what is no bank --------------------------------------------------------------------------------------------------


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


@pytest.fixture
def shard(folder: BankFolder) -> Path:
    """The second file."""
    return folder.path / folder.manifest()["segments"][1]["file"]


def test_a_cut_file_is_named(folder: BankFolder, shard: Path) -> None:
    whole = shard.read_bytes()
    for length in (0, 1, 7, 8, 9, 200, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:length])
        assert "damaged" in refused(folder, str(shard))
        rewrite(folder, lambda manifest, length=length: manifest["segments"][1].update(bytes=length))
        assert "damaged" in refused(folder, str(shard))
        rewrite(folder, lambda manifest: manifest["segments"][1].update(bytes=len(whole)))
    shard.write_bytes(whole + b"\x00")
    refused(folder, str(shard))
    shard.write_bytes(whole)
    opens(folder)


def test_verify_finds_a_flipped_bit_anywhere(folder: BankFolder, shard: Path) -> None:
    whole = shard.read_bytes()
    places = [*range(0, 16), *range(16, len(whole), 211), len(whole) - 1]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        shard.write_bytes(bytes(flipped))
        refused(folder, str(shard))
    assert len(places) > 50


def test_a_missing_file_is_named(folder: BankFolder, shard: Path) -> None:
    shard.unlink()
    assert "is missing" in refused(folder, str(shard))
    shard.mkdir()
    assert "damaged" in refused(folder, str(shard))


def test_another_files_content_is_found(folder: BankFolder, shard: Path, tmp_path: Path) -> None:
    """Of another size, of another segment with the entry's bytes made to fit, and of another bank of the same sizes."""
    whole, first = shard.read_bytes(), folder.path / folder.manifest()["segments"][0]["file"]
    shard.write_bytes(first.read_bytes())
    refused(folder, str(shard))
    rewrite(folder, lambda manifest: manifest["segments"][1].update(bytes=first.stat().st_size))
    refused(folder, str(folder.path))
    rewrite(folder, lambda manifest: manifest["segments"][1].update(bytes=len(whole)))
    shard.write_bytes(whole)
    other = BankFolder(tmp_path / "other")
    bank = folder.open("cpu", Tiers(values="host"))
    for segment in bank.segments:
        for layer in segment.layers:
            layer.value_CGW.neg_()
    bank.segments = tuple(replace(segment, file=None) for segment in bank.segments)
    other.save(bank)
    shard.write_bytes((other.path / other.manifest()["segments"][1]["file"]).read_bytes())
    assert len(folder.open()) == 19, "nothing but the checksum can tell"
    assert "checksum" in refused(folder, str(shard))


def rewrite(folder: BankFolder, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder.path / MANIFEST
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for name in path[:-1]:
            manifest = manifest[name]
        manifest[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("format", value=2), put("format", value="1"), put("shape", value=None), put("segments", value={}),
        put("segments", value=None), put("next_number", value="20"), put("next_number", value=0),
        put("next_number", value=5), put("next_number", value=2**40), put("next_number", value=True),
        put("documents", value=18), put("documents", value=-1), put("tokens", value=1.5),
        put("shape", "dtype", value="int64"), put("shape", "dtype", value=[]), put("shape", "precision", value="int4"),
        put("shape", "precision", value={}), put("shape", "precision", value="int8"), put("shape", "layers", value=[]),
        put("shape", "layers", value=[2, "3"]), put("shape", "layers", value=[2, 9]),
        put("shape", "layers", value=[2, True]), put("shape", "groups", value=0), put("shape", "groups", value=10**40),
        put("shape", "groups", value=10**4000),
        put("shape", "width", value=2**60), put("shape", "chunk_size", value=0), put("shape", "chunk_size", value=4),
        put("shape", "chunk_size", value=2**62), put("shape", "model", value=7), put("segments", 1, value=[]),
        put("segments", 1, "bytes", value="9"), put("segments", 1, "bytes", value=10**30),
        put("segments", 1, "documents", value=0), put("segments", 1, "sha256", value=0),
        put("segments", 1, "sha256", value="0" * 64), put("segments", 1, "removed", value=[0]),
        put("segments", 1, "removed", value=[2**32]), put("segments", 1, "removed", value=["x"]),
        put("segments", 1, "removed", value=[19]), put("segments", 1, "removed", value=3),
        lambda manifest: manifest["segments"].append(manifest["segments"][0]), lambda manifest: manifest.clear(),
        lambda manifest: manifest["segments"][1].pop("sha256"), lambda manifest: manifest["shape"].pop("model"),
    ],
)  # fmt: skip
def test_a_manifest_with_a_wrong_entry_is_refused(folder: BankFolder, change: Callable[[Any], None]) -> None:
    rewrite(folder, change)
    refused(folder, str(folder.path))


def test_a_segment_is_in_a_bank_once(folder: BankFolder) -> None:
    """With counts that fit."""

    def twice(manifest: dict[str, Any]) -> None:
        record = manifest["segments"][0]
        manifest["segments"].append(record)
        for name in ("documents", "tokens", "chunks"):
            manifest[name] += record[name]

    rewrite(folder, twice)
    assert "given twice" in refused(folder, str(folder.path / MANIFEST))


@pytest.mark.parametrize(
    "name", ["../other/segment-{}", "/etc/passwd", "segment-/../../x", "segment-\x00", "segment-", ".", "", "\ud800", 3]
)
def test_a_manifest_names_no_file_outside_its_folder(folder: BankFolder, shard: Path, name: Any) -> None:
    other = folder.path.parent / "other"
    other.mkdir()
    (other / shard.name).write_bytes(shard.read_bytes())
    if isinstance(name, str):
        name = name.format(shard.name.removeprefix("segment-"))
    rewrite(folder, put("segments", 1, "file", value=name))
    assert "'file'" in refused(folder, str(folder.path / MANIFEST))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"3", b"\xff\xfe\x00", b"\x80abc", b"[" * 200_000, b'{"format": 1' + b"0" * 5000 + b"}",
     b'{"format": 1}', b'{"format": 1, "format": 2}', b"NaN"],
    ids=range(12),
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused(folder: BankFolder, content: bytes) -> None:
    (folder.path / MANIFEST).write_bytes(content)
    refused(folder, str(folder.path / MANIFEST))
    with pytest.raises(UserError, match=MANIFEST):
        folder.save(MemoryBank(None))  # type: ignore[arg-type]


def test_a_folder_that_is_no_bank_is_named(tmp_path: Path, wanted: MemoryBank, encoder: Encoder) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / ("x" * 300)):
        refused(BankFolder(path), str(path), "no memory bank")
    (tmp_path / "thesis.tex").write_text("three years")
    for act in (lambda folder: folder.save(wanted), lambda folder: folder.encode(encoder, [])):
        with pytest.raises(UserError, match=r"holds something that is no bank \('thesis.tex'\)"):
            act(BankFolder(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_other_files_beside_a_bank_stay(folder: BankFolder) -> None:
    for name in ("segments.txt", "segment-notes.md", "README.md"):
        (folder.path / name).write_text("mine")
    bank = folder.open()
    bank.remove(["d1", "d2", "d3", "d4"])
    folder.save(bank)
    assert {"segments.txt", "segment-notes.md", "README.md"} <= files(folder).keys()


@pytest.mark.parametrize("name", ["file/bank", "file", "x" * 300])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, wanted: MemoryBank, encoder: Encoder, name: str) -> None:
    (tmp_path / "file").write_text("")
    folder = BankFolder(tmp_path / name)
    for act in (lambda: folder.save(wanted), lambda: folder.encode(encoder, [])):
        with pytest.raises(UserError) as told:
            act()
        assert str(folder.path) in str(told.value)


def test_room_is_asked_for_before_it_is_taken(tmp_path: Path) -> None:
    check_room(tmp_path / "a" / "b", 1000)
    with pytest.raises(UserError, match=r"the bank takes 931322574615.5 GiB, [\d.]+ [GM]iB are free"):
        check_room(tmp_path / "a" / "b", 10**21)
    assert gib(2**30) == "1.0 GiB" and gib(2**30 - 1) == "1024.0 MiB" and gib(0) == "0.0 MiB"


# --- anything at all --------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from([2**31, 2**63, 10**40]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def survives(folder: BankFolder) -> bool:
    """Opens and reads everything, or says in one line what is wrong."""
    try:
        opens(folder)
    except UserError as error:
        assert str(folder.path) in str(error) and "\n" not in str(error)
        return False
    return True


@pytest.fixture(scope="module")
def fuzzed(
    tmp_path_factory: pytest.TempPathFactory, encoder: Encoder, protocol: Protocol
) -> tuple[BankFolder, bytes, Path, bytes]:
    """A folder whose files are put back before each attempt."""
    folder = BankFolder(tmp_path_factory.mktemp("fuzzed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "SEGMENT_BYTES", 6000)
        folder.encode(Encoder(encoder.model, protocol, "int8"), passages(protocol, range(9)), corpus="animals")
    shard = folder.path / folder.manifest()["segments"][1]["file"]
    return folder, (folder.path / MANIFEST).read_bytes(), shard, shard.read_bytes()


Fuzzed = tuple[BankFolder, bytes, Path, bytes]


@quick
@given(
    content=st.binary(max_size=300)
    | st.text(max_size=200).map(str.encode)
    | json_values.map(lambda v: json.dumps(v).encode())
)
def test_any_bytes_as_manifest(fuzzed: Fuzzed, content: bytes) -> None:
    folder, manifest, _, _ = fuzzed
    (folder.path / MANIFEST).write_bytes(content)
    assert not survives(folder)
    (folder.path / MANIFEST).write_bytes(manifest)


@quick
@given(data=st.data())
def test_any_value_in_a_manifest(fuzzed: Fuzzed, data: st.DataObject) -> None:
    folder, manifest, _, _ = fuzzed
    changed = json.loads(manifest)
    place: Any = changed
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if isinstance(inner, dict | list) and len(inner) and data.draw(st.booleans()):
            place = inner
            continue
        near = st.integers(inner - 2, inner + 2) if type(inner) is int else st.nothing()
        place[key] = data.draw(json_values | near)
        break
    (folder.path / MANIFEST).write_text(json.dumps(changed))
    survives(folder)
    (folder.path / MANIFEST).write_bytes(manifest)


@quick
@given(data=st.data())
def test_any_bytes_in_a_file(fuzzed: Fuzzed, data: st.DataObject) -> None:
    """In its header, its tables and its tensors; and any file of the right size."""
    folder, _, shard, whole = fuzzed
    header = 8 + int.from_bytes(whole[:8], "little")
    changed = bytearray(whole)
    if data.draw(st.integers(0, 9)) == 0:
        start = data.draw(st.binary(max_size=200))
        changed[: len(start)] = start
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.one_of(st.integers(0, 7), st.integers(8, header - 1), st.integers(header, len(whole) - 1)))
        changed[place] = data.draw(st.integers(0, 255))
    shard.write_bytes(bytes(changed))
    assert not survives(folder) or bytes(changed) == whole
    shard.write_bytes(whole)


@quick
@given(data=st.data())
def test_any_entry_in_a_files_header(fuzzed: Fuzzed, data: st.DataObject) -> None:
    """A header that is still JSON and says something else, with a checksum that fits."""
    folder, manifest, shard, whole = fuzzed
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    other = data.draw(st.sampled_from(sorted(header)))
    kind = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "swap", "drop", "rename", "value"]))
    if kind == "swap":
        header[name], header[other] = header[other], header[name]
    elif kind == "drop":
        del header[name]
    elif kind == "rename":
        header[data.draw(st.text(max_size=6))] = header.pop(name)
    elif kind == "value":
        header[name] = data.draw(json_values)
    elif kind == "dtype":
        header[name]["dtype"] = data.draw(
            st.sampled_from(
                ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "I8", "BOOL", "U64", "F8_E4M3", "C64", "F4", "?"]
            )
        )
    else:
        numbers = st.integers(0, 300) | st.integers(2**62, 2**64) | st.integers(-3, 0)
        header[name][kind] = data.draw(st.lists(numbers, max_size=4))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text + whole[8 + length :]
    shard.write_bytes(content)
    changed = json.loads(manifest)
    changed["segments"][1].update(bytes=len(content), sha256=files_of.checksum(shard))
    (folder.path / MANIFEST).write_text(json.dumps(changed))
    survives(folder)
    shard.write_bytes(whole)
    (folder.path / MANIFEST).write_bytes(manifest)


@quick
@given(data=st.data())
def test_any_number_in_a_files_tables(fuzzed: Fuzzed, data: st.DataObject) -> None:
    """Numbers, tokens and offsets far and near, with a checksum that fits."""
    folder, manifest, shard, whole = fuzzed
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([name for name in sorted(header) if header[name]["dtype"] == "I64"]))
        start = 8 + length + header[name]["data_offsets"][0]
        place = start + 8 * data.draw(st.integers(0, header[name]["shape"][0] - 1))
        old = int.from_bytes(changed[place : place + 8], "little", signed=True)
        near = st.integers(max(old - 3, -(2**63)), min(old + 3, 2**63 - 1))
        new = data.draw(near | st.integers(-(2**63), 2**63 - 1))
        changed[place : place + 8] = new.to_bytes(8, "little", signed=True)
    shard.write_bytes(bytes(changed))
    record = json.loads(manifest)
    record["segments"][1].update(sha256=files_of.checksum(shard))
    (folder.path / MANIFEST).write_text(json.dumps(record))
    survives(folder)
    shard.write_bytes(whole)
    (folder.path / MANIFEST).write_bytes(manifest)


@pytest.mark.parametrize("number", [-5, 0, 2**32 - 1, 2**40])
def test_a_number_out_of_range_does_not_pass(fuzzed: Fuzzed, number: int) -> None:
    """The first of a file, or the last, so that numbers still ascend."""
    folder, manifest, shard, whole = fuzzed
    length = int.from_bytes(whole[:8], "little")
    start, stop = (8 + length + offset for offset in json.loads(whole[8 : 8 + length])["number"]["data_offsets"])
    place = start if number < 1 else stop - 8
    shard.write_bytes(whole[:place] + number.to_bytes(8, "little", signed=True) + whole[place + 8 :])
    rewrite(folder, put("next_number", value=2**32 - 1))
    with pytest.raises(UserError, match="number is out of range"):
        folder.open()
    shard.write_bytes(whole)
    (folder.path / MANIFEST).write_bytes(manifest)


def test_offsets_that_wrap_around_do_not_pass(fuzzed: Fuzzed) -> None:
    """Every difference of these is positive in 64 bits."""
    folder, _, shard, whole = fuzzed
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    for name in ("text.offsets", "id.offsets", "chunk_offsets"):
        start, stop = (8 + length + offset for offset in header[name]["data_offsets"])
        assert stop - start >= 4 * 8
        changed = bytearray(whole)
        for place, value in ((1, 9 * 10**18), (2, -9 * 10**18)):
            changed[start + 8 * place : start + 8 * place + 8] = value.to_bytes(8, "little", signed=True)
        shard.write_bytes(bytes(changed))
        with pytest.raises(UserError, match=f"'{name}' does not ascend"):
            folder.open()
        shard.write_bytes(whole)


def test_words_that_are_no_utf_8_are_found_when_they_are_read(fuzzed: Fuzzed) -> None:
    folder, _, shard, whole = fuzzed
    bank = folder.open()
    number = bank.numbers()[len(bank.segments[0].ids)]
    for word, ask in ((bank.text(number), MemoryBank.text), (bank.id(number), MemoryBank.id)):
        place = whole.index(word.encode())
        shard.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        opened = folder.open()
        with pytest.raises(UserError, match=f"{shard}: damaged"):
            ask(opened, number)
        with pytest.raises(UserError, match=f"{shard}: damaged"):
            ask(opened.share(0, 1), number)
        shard.write_bytes(whole)
    shard.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
    opened = folder.open()
    with pytest.raises(UserError, match=f"{shard}: damaged"):
        opened.remove(["d1"])
    shard.write_bytes(whole)


@quick
@given(content=st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()))
def test_anything_left_of_an_encoding_is_survived(
    fuzzed: Fuzzed, encoder: Encoder, protocol: Protocol, content: bytes
) -> None:
    folder = BankFolder(fuzzed[0].path.parent / f"{fuzzed[0].path.name}-left")
    folder.path.mkdir(exist_ok=True)
    (folder.path / MANIFEST).unlink(missing_ok=True)
    (folder.path / UNFINISHED).write_bytes(content)
    folder.encode(encoder, passages(protocol, range(2)))
    assert folder.open().numbers() == [1, 2] and files(folder).keys() == {MANIFEST, *listed(folder)}


def test_answers_of_a_bank_on_disk_are_those_of_one_in_memory(folder: BankFolder, wanted: MemoryBank) -> None:
    for seed in range(3):
        assert_same_answers(folder.open(), wanted, seed)
