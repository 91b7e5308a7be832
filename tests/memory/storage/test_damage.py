"""What is no bank, or was damaged, is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from msa_train.errors import UserError
from msa_train.memory import BankFolder, Encoder, MemoryBank, Tiers
from msa_train.memory.manifest import MANIFEST
from msa_train.memory.room import check_room, gib
from tests.memory.storage.folders import files, opens, put, refused, rewrite


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


@pytest.mark.parametrize(
    "change",
    [
        put("format", value=1), put("format", value="1"), put("shape", value=None), put("segments", value={}),
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


def test_a_bank_of_the_format_before_is_encoded_again(folder: BankFolder) -> None:
    rewrite(folder, put("format", value=1))
    refused(folder, str(folder.path / MANIFEST), "a bank of another format; encode it again with this version")


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
    [b"", b"{", b"null", b"[]", b"3", b"\xff\xfe\x00", b"\x80abc", b"[" * 200_000, b'{"format": 2' + b"0" * 5000 + b"}",
     b'{"format": 2}', b'{"format": 2, "format": 1}', b"NaN"],
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
