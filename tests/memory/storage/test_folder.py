"""A bank's folder: what is saved is what is opened, and what is written again."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from msa_train.errors import UserError
from msa_train.kernels.maxsim import Precision
from msa_train.memory import BankFolder, Encoder, MemoryBank
from msa_train.memory.manifest import MANIFEST
from msa_train.model import MemorySparseModel
from msa_train.protocol import Protocol
from tests.memory.banks import HEADS, PRECISIONS, K, assert_same, assert_same_answers, queries
from tests.memory.conftest import passages
from tests.memory.storage.folders import files, large_bank, linux, verified, written

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
    for _ in range(2):
        assert written(folder, lambda: folder.save(bank)) == ({MANIFEST}, set())
    assert len(bank.segments) == len(old) - 1


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


def test_answers_of_a_bank_on_disk_are_those_of_one_in_memory(folder: BankFolder, wanted: MemoryBank) -> None:
    for seed in range(3):
        assert_same_answers(folder.open(), wanted, seed)
