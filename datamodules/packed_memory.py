"""PackedMemory: the LightningDataModule that turns a corpus into packs for every stage of a run.

Step s, accumulation a, rank r of W reads pack (s * A + a) * W + r: the place in the data follows from the step alone,
so there is no loader state to save, a resumed run goes on exactly, and another number of ranks keeps the global order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from datamodules.corpus import Corpus, read_beir
from datamodules.packing import PackDataset, Packer, PackingConfig, TokenizedCorpus
from datamodules.python_docs import build_python_docs, cache_root
from datamodules.tokenizer import open_tokenizer, train_tokenizer
from msa_train.errors import UserError
from msa_train.pack import MemoryPack
from msa_train.protocol import Protocol, RoutingWords

PYTHON_DOCS = "python-docs"


class PackedMemory(L.LightningDataModule):
    """Packs of many documents and many queries from a BEIR folder.

    Args:
        corpus: Folder with corpus.jsonl, queries.jsonl and qrels/*.tsv; or `python-docs`, the documentation of this
            Python installation.
        tokenizer: Folder or hub name of a Hugging Face tokenizer; by default a byte-level BPE is trained on the corpus.
        vocab_size: Size of that BPE.
        document_tokens: Token budget of a pack's documents. The contexts of its queries come on top.
        queries_per_pack: Queries that share the documents of a pack: all of them learn from one encoding.
        answer_share: Share of the queries that go on from retrieval to injected text and answer.
        train_split: Split to train on.
        val_splits: Splits to validate, test and predict on, each with metrics of its own.
        val_packs: Packs of every such split to validate on; 0 for all.
        overfit_packs: Train on the first packs only, over and over; 0 for all.
        seed: Draws queries, negatives and their order.
        num_workers: Processes that build packs ahead of the training step.
        chunk_size: Taken from model.msa.chunk_size.
        routing_words: Taken from model.routing_words.
    """

    def __init__(
        self,
        corpus: str = PYTHON_DOCS,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        document_tokens: int = 65_536,
        queries_per_pack: int = 16,
        answer_share: float = 0.25,
        train_split: str = "train",
        val_splits: tuple[str, ...] = ("test",),
        val_packs: int = 8,
        overfit_packs: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        chunk_size: int = 64,
        routing_words: RoutingWords = "question",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("document_tokens", document_tokens, 1),
            ("queries_per_pack", queries_per_pack, 1),
            ("vocab_size", vocab_size, 300),
            ("val_packs", val_packs, 0),
            ("overfit_packs", overfit_packs, 0),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise UserError(f"data.{name} is {value}: give at least {least}")
        if not 0 <= answer_share <= 1:
            raise UserError(f"data.answer_share is {answer_share}: give a share between 0 and 1")
        self.corpus_name, self.tokenizer_name, self.vocab_size = corpus, tokenizer, vocab_size
        self.train_split, self.val_splits = train_split, tuple(val_splits)
        self.val_packs, self.overfit_packs, self.num_workers = val_packs, overfit_packs, num_workers
        self.routing_words: RoutingWords = routing_words
        self.packing = PackingConfig(document_tokens, queries_per_pack, answer_share, chunk_size, seed)
        self.data: TokenizedCorpus | None = None

    def prepare_data(self) -> None:
        """Builds what is kept on disk, on one process; nothing where `setup` has already read it."""
        if self.data is not None:
            return
        corpus = self._read_corpus()
        if self.tokenizer_name is None:
            train_tokenizer(corpus.documents, self.vocab_size, cache_root())

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises the corpus.

        Raises:
            UserError: Something is missing or malformed, or does not fit the budget.
        """
        if self.data is not None:
            return
        corpus = self._read_corpus()
        for split in (self.train_split, *self.val_splits):
            corpus.split(split)
        tokenizer = (
            open_tokenizer(self.tokenizer_name)
            if self.tokenizer_name is not None
            else train_tokenizer(corpus.documents, self.vocab_size, cache_root())
        )
        self.protocol = Protocol(tokenizer, self.routing_words)
        self.data = TokenizedCorpus.of(corpus, self.protocol)
        self.packers = {
            split: Packer(self.data, self.protocol, split, self.packing)
            for split in (self.train_split, *self.val_splits)
        }

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer, with the control tokens."""
        return self.protocol.tokenizer

    def describe(self) -> str:
        """One line on what the run reads."""
        assert self.data is not None
        packer = self.packers[self.train_split]
        tokens = sum(map(len, self.data.documents))
        return (
            f"{len(self.data.documents):,} documents, {tokens:,} tokens; {len(packer.queries):,} training queries "
            f"in {packer.packs_per_epoch:,} packs an epoch"
        )

    def train_dataloader(self) -> DataLoader[MemoryPack]:
        """This rank's packs from the current step to the last."""
        trainer = self._trainer()
        world, accumulated = trainer.world_size, trainer.accumulate_grad_batches
        packer = self.packers[self.train_split]
        dataset = PackDataset(packer, world * accumulated, self.overfit_packs)
        steps = trainer.max_steps if trainer.max_steps > 0 else packer.packs_per_epoch // (world * accumulated)
        sampler = StepSampler(
            start=trainer.global_step * accumulated,
            stop=max(steps, 1) * accumulated,
            rank=trainer.global_rank,
            world=world,
        )
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> list[DataLoader[MemoryPack]]:
        """The first packs of every validation split."""
        return [self._evaluation(split, self.val_packs) for split in self.val_splits]

    def test_dataloader(self) -> list[DataLoader[MemoryPack]]:
        """All packs of every validation split."""
        return [self._evaluation(split, 0) for split in self.val_splits]

    def predict_dataloader(self) -> list[DataLoader[MemoryPack]]:
        """All packs of every validation split."""
        return self.test_dataloader()

    def evaluation_packs(self, split: str) -> list[MemoryPack]:
        """All packs that a split is validated on, whichever ranks read them."""
        return [self.packers[split].pack(index) for index in range(self._packs(split, self.val_packs))]

    def _packs(self, split: str, limit: int) -> int:
        whole = self.packers[split].packs_per_epoch
        return min(limit, whole) if limit else whole

    def _evaluation(self, split: str, limit: int) -> DataLoader[MemoryPack]:
        trainer, packs = self._trainer(), self._packs(split, limit)
        rounds = -(-packs // trainer.world_size)  # every rank runs as many, or collectives would wait for ever
        dataset = _Evaluation(PackDataset(self.packers[split]), packs)
        return self._loader(dataset, StepSampler(0, rounds, trainer.global_rank, trainer.world_size))

    def _loader(self, dataset: Dataset[MemoryPack], sampler: StepSampler) -> DataLoader[MemoryPack]:
        return PackLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=self._trainer().strategy.root_device.type == "cuda",
            persistent_workers=False,
        )

    def _read_corpus(self) -> Corpus:
        return read_beir(build_python_docs() if self.corpus_name == PYTHON_DOCS else Path(self.corpus_name))

    def _trainer(self) -> L.Trainer:
        assert self.trainer is not None, "loaders are made for a trainer"
        return self.trainer


class StepSampler(Sampler[int]):
    """Pack indices of one rank: `place * world + rank` from `start` on. Its length counts from 0, as Lightning's
    progress does after a resume.

    >>> list(StepSampler(start=2, stop=4, rank=1, world=3)), len(StepSampler(start=2, stop=4, rank=1, world=3))
    ([7, 10], 4)
    """

    def __init__(self, start: int, stop: int, rank: int, world: int) -> None:
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __iter__(self) -> Iterator[int]:
        return (place * self.world + self.rank for place in range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop


class PackLoader(DataLoader[MemoryPack]):
    """A loader that Lightning may resume: its place follows from the trainer's step, so its state is empty."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see `PackedMemory.train_dataloader`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class _Evaluation(Dataset[MemoryPack]):
    """The first `packs` packs; later indices repeat one that does not count."""

    def __init__(self, dataset: PackDataset, packs: int) -> None:
        self.dataset, self.packs = dataset, packs

    def __getitem__(self, index: int) -> MemoryPack:
        return replace(self.dataset[index % self.packs], counted=index < self.packs)
