"""Anything at all in a bank's files: it is read, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msa_train.errors import UserError
from msa_train.memory import BankFolder, Encoder, MemoryBank, encoding
from msa_train.memory import files as files_of
from msa_train.memory.manifest import MANIFEST, UNFINISHED
from msa_train.protocol import Protocol
from tests.memory.conftest import passages
from tests.memory.storage.folders import files, listed, opens, put, rewrite

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

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


@pytest.mark.parametrize("end", [-1, 3, 2**31 - 1])
def test_a_part_whose_name_is_shorter_than_its_documents_does_not_pass(fuzzed: Fuzzed, end: int) -> None:
    """The names are of two letters."""
    folder, _, shard, whole = fuzzed
    length = int.from_bytes(whole[:8], "little")
    start, _ = (8 + length + offset for offset in json.loads(whole[8 : 8 + length])["source_ends"]["data_offsets"])
    shard.write_bytes(whole[:start] + end.to_bytes(4, "little", signed=True) + whole[start + 4 :])
    with pytest.raises(UserError, match=f"{shard}: damaged: the name of a part"):
        folder.open()
    shard.write_bytes(whole)


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
