"""A full disk, and two writers at once: the old bank stays."""

from __future__ import annotations

import errno
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp
from safetensors import SafetensorError

from msa_train.errors import UserError
from msa_train.memory import BankFolder, Encoder, MemoryBank, storage
from msa_train.memory import files as files_of
from msa_train.memory.manifest import MANIFEST
from msa_train.memory.segment import Segment
from msa_train.protocol import Protocol
from tests.memory.banks import assert_same
from tests.memory.conftest import passages
from tests.memory.storage.folders import files, finished, large_bank, linux, listed, verified


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
