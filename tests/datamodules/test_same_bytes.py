"""The same pack index gives the same bytes: on any machine, with any number of workers, ranks and accumulations."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from datamodules import PackedMemory
from datamodules.packed_memory import StepSampler
from datamodules.packing import PackDataset
from msa_train.pack import MemoryPack, TensorFields
from tests.conftest import FIXTURES
from tests.datamodules.corpora import write_instructions, write_tangled_corpus

GOLDEN = FIXTURES / "golden_packs.json"
PACKS = 24


def digest(pack: MemoryPack) -> str:
    """Of every tensor, name and count of a pack."""
    found = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            found.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, TensorFields):
            for name, part in vars(value).items():
                found.update(name.encode())
                add(part)
        else:
            found.update(repr(value).encode())

    add(pack)
    return found.hexdigest()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PackedMemory:
    """Bytes for tokens: a tokenizer that no training made."""
    root = tmp_path_factory.mktemp("same")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(root / "bytes")
    corpus = {
        str(write_tangled_corpus(root / "tangled")): 1.0,
        str(write_instructions(root / "chat")): 0.5,
    }
    module = PackedMemory(
        corpus=corpus, tokenizer=str(root / "bytes"), max_document_tokens=200, chunk_size=16, answer_share=0.3,
        document_tokens={0: 8192, 4: 16_384}, queries_per_pack=6, negatives={"bm25": 1}, val_splits=("test",),
    )  # fmt: skip
    module.setup()
    return module


def read(data: PackedMemory, workers: int, world: int) -> dict[int, str]:
    """All packs of 24 / world steps, as the ranks' loaders hand them out."""
    packs: dict[int, str] = {}
    for rank in range(world):
        dataset = PackDataset(data.stages, world)
        sampler = StepSampler(0, PACKS // world, rank, world)
        loader = DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=workers)
        packs.update({pack.index: digest_of_content(pack) for pack in loader})
    return packs


def digest_of_content(pack: MemoryPack) -> str:
    """Without the counts of its step, which are the world's."""
    return digest(replace(pack, step_labels=0, step_queries=0))


def test_any_number_of_workers_and_of_ranks(data: PackedMemory) -> None:
    alone = read(data, 0, 1)
    assert len(set(alone.values())) == PACKS
    assert read(data, 2, 1) == alone
    # a curriculum counts steps, so ranks share the order of packs within a stage
    only = PackedMemory.__new__(PackedMemory)
    only.stages = {0: data.stages[4]}
    one, two, three = (read(only, workers, world) for workers, world in ((0, 1), (1, 2), (0, 3)))
    assert one == two == three


def test_the_recorded_bytes(data: PackedMemory) -> None:
    """Made elsewhere; `MSA_GOLDEN=write pytest -k recorded_bytes` records them anew."""
    found = [digest(PackDataset(data.stages, 2)[index]) for index in range(PACKS)]
    if os.environ.get("MSA_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(GOLDEN.read_text())


def test_a_store_carried_to_another_machine(
    data: PackedMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What asks for what and the mined negatives travel along; the corpus does not."""
    assert data.data is not None
    carried = {}
    for store, (source, weight) in zip(data.data.stores, data.corpora.items(), strict=True):
        folder = tmp_path / Path(source).name
        shutil.copytree(store.folder, folder)
        carried[str(folder)] = weight
    held = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.arrow")}
    assert [file for file in held if file.name == "negatives-bm25.arrow"]
    monkeypatch.setenv("MSA_TRAIN_CACHE", str(tmp_path / "empty"))
    packing = data.packing
    module = PackedMemory(
        corpus=carried, tokenizer=data.tokenizer_name, max_document_tokens=200, chunk_size=16,
        document_tokens={0: 8192, 4: 16_384}, answer_share=packing.answer_share,
        queries_per_pack=packing.queries_per_pack, negatives={"bm25": 1}, val_splits=("test",),
    )  # fmt: skip
    module.setup()
    assert read(module, 0, 1) == read(data, 0, 1)
    found = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.arrow")}
    assert found == held, "nothing was tokenised or mined again"


def test_a_spawned_worker_hands_out_the_same(data: PackedMemory) -> None:
    loader = DataLoader(
        PackDataset(data.stages, 1), batch_size=None, sampler=StepSampler(0, 3, 0, 1), num_workers=1,
        multiprocessing_context="spawn",
    )  # fmt: skip
    assert {pack.index: digest(pack) for pack in loader} == {
        index: digest(PackDataset(data.stages, 1)[index]) for index in range(3)
    }
