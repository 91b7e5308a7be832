"""An encoding that is broken off, wherever it is, goes on."""

from __future__ import annotations

import copy
import errno
import json
import os
import signal
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from msa_train.errors import UserError
from msa_train.memory import BankFolder, Encoder, MemoryBank, Passage, encoding
from msa_train.memory import files as files_of
from msa_train.memory.manifest import MANIFEST, UNFINISHED
from msa_train.memory.segment import Segment
from msa_train.model import MemorySparseModel
from msa_train.protocol import Protocol
from tests.memory.banks import assert_same
from tests.memory.conftest import passages
from tests.memory.storage.folders import files, finished, listed, verified


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


@pytest.mark.parametrize("kind", ["order", "text", "id", "source", "tokens", "fewer", "model"])
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
    elif kind == "source":
        documents[place] = replace(documents[place], source="" if documents[place].source else "d")
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
        wrong = {"garbage": "\x00{", "nested": "[" * 100_000, "list": "[]", "entry": '{"format": 2, "segments": [3]}'}
        file.write_text(wrong[damage])
    encoded = counting(monkeypatch)
    folder.encode(encoder, documents)
    assert len(encoded) == 19 - kept
    assert_same(folder.open(), wanted)
    assert files(folder).keys() == {MANIFEST, *listed(folder)}


@pytest.mark.parametrize("after", [0, 1, 3, 4, 5, 6])
def test_a_broken_off_change_leaves_a_whole_bank_and_goes_on(
    folder: BankFolder, wanted: MemoryBank, encoder: Encoder, protocol: Protocol, monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:  # fmt: skip
    """Four documents are new, two are replaced, one is too many; each is a segment."""
    monkeypatch.setattr(encoding, "SEGMENT_BYTES", 1)
    new, changed = passages(protocol, range(30, 34)), passages(protocol, [17, 2], " Changed.")
    with monkeypatch.context() as patch:
        done = counting(patch)
        honest = Encoder._encode

        def failing(self: Encoder, batch: list[Any], shape: Any) -> Segment:
            if len(done) == after:
                raise KeyboardInterrupt
            return honest(self, batch, shape)

        patch.setattr(Encoder, "_encode", failing)
        with pytest.raises(KeyboardInterrupt) if after < 6 else nullcontext():
            folder.change(encoder, new, changed, ["d5"])
    assert verified(folder) > 0
    left = folder.open()
    assert len(left) == (19 + after if after < 5 else 23 - after // 6)
    assert left.has("d5") == (after < 6) and left.text(3) == (wanted.text(3) if after < 5 else changed[1].text)
    if after < 6:
        rest = [document for document in new if not left.has(document.id)]
        folder.change(encoder, rest, changed, ["d5"])
    encoder.add(wanted, new)
    encoder.replace(wanted, changed)
    wanted.remove(["d5"])
    assert_same(folder.open(), wanted)
    assert files(folder).keys() == {MANIFEST, *listed(folder)}


def test_a_change_does_not_keep_in_memory_what_it_has_saved(
    folder: BankFolder, encoder: Encoder, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "SEGMENT_BYTES", 1)
    held: list[weakref.ref[torch.Tensor]] = []
    honest = Encoder.encode

    def watched(*given: Any) -> Iterator[Segment]:
        for segment in honest(*given):
            held.append(weakref.ref(segment.layers[0].key_CGW))
            assert sum(tensor() is not None for tensor in held) <= 2, "the one that is saved, and the one before"
            yield segment

    monkeypatch.setattr(Encoder, "encode", watched)
    folder.change(encoder, passages(protocol, range(30, 40)), passages(protocol, range(5), " Changed."), [])
    assert len(held) == 15


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
