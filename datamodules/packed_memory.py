"""PackedMemory: the LightningDataModule that turns a corpus into packs for every stage of a run.

Step s, accumulation a, rank r of W reads pack (s * A + a) * W + r: the place in the data follows from the step alone,
so there is no loader state to save, a resumed run goes on exactly, and another number of ranks keeps the global order.
Where n ranks share a pack, they count as one rank: r // n of W / n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from rich import get_console
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from datamodules.cache import cache_root
from datamodules.collection import Collection
from datamodules.examination import PackSample, examine_corpora, examine_packs, examine_splits
from datamodules.mining import mine_router
from datamodules.negatives import Mined, mine_bm25, mined_file
from datamodules.opening import PYTHON_DOCS, open_corpus, open_store
from datamodules.packing import PackDataset, Packer
from datamodules.planning import PackingConfig, Plan, Planner
from datamodules.records import encodable
from datamodules.store import is_store
from datamodules.summary import print_store
from datamodules.tokenizer import open_tokenizer, train_tokenizer
from msa_train.errors import UserError
from msa_train.findings import Finding
from msa_train.model import MemorySparseModel
from msa_train.pack import MemoryPack
from msa_train.protocol import Protocol, RoutingWords
from msa_train.sharing import share
from msa_train.source import PackSource

BM25 = "bm25"
LARGEST = 2**27  # document tokens of a pack: beyond any card, and a slip of the finger
SAMPLE = 64_000_000  # characters that a tokenizer is trained on, at most


class PackedMemory(PackSource):
    """Packs of many documents and many queries, from any number of corpora.

    Args:
        corpus: A corpus, or several with a weight each: `{wiki: 1, debian: 0.5}`. A weight says how often a corpus'
            queries come per epoch, and how often its documents are drawn, compared with once. A corpus is a BEIR
            folder, a mapping of columns (configs/corpora/*.yaml), a published benchmark's pickle, a store that
            `msa-train pack` built, or `python-docs`, the documentation of this Python installation.
        tokenizer: Folder or hub name of a Hugging Face tokenizer; by default a byte-level BPE is trained on the corpus.
        vocab_size: Size of that BPE.
        max_document_tokens: Longer documents are split at the ends of their sentences.
        document_tokens: Token budget of a pack's documents; the contexts of its queries come on top. Or a curriculum:
            the budget from each step on, `{0: 8192, 4000: 65536}`. Validation uses the last.
        queries_per_pack: Queries that share the documents of a pack: all of them learn from one encoding. A number
            below 1 is the share of the document tokens that their contexts take.
        answer_share: Share of the queries that go on from retrieval to injected text and answer.
        distractors: Documents of the pack that do not answer, which an answered query reads beside those that do, as
            when a router hands over more than are needed: from none to so many, drawn; mined negatives first.
        negatives: Mined negatives that every query brings into its pack, by who mined them: `{bm25: 2}`, or the folder
            that `msa-train mine` wrote. The rest of a pack's documents are the other queries' and random ones.
        train_split: Split to train on.
        val_splits: Splits to validate, test and predict on, each with metrics of its own.
        val_packs: Packs of every such split to validate on; 0 for all.
        overfit_packs: Train on the first packs only, over and over; 0 for all.
        seed: Draws queries, negatives and their order.
        num_workers: Processes that tokenise, and that build packs ahead of the training step.
        document_parallel: Ranks that share one pack: each encodes its part of the documents, and all read the whole
            memory. It must divide the number of ranks (docs/scaling.md).
        chunk_size: Taken from model.msa.chunk_size.
        routing_words: Taken from model.routing_words.
    """

    def __init__(
        self,
        corpus: str | dict[str, float] = PYTHON_DOCS,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        max_document_tokens: int = 1024,
        document_tokens: int | dict[int, int] = 65_536,
        queries_per_pack: float = 16,
        answer_share: float = 0.25,
        distractors: int = 0,
        negatives: dict[str, int] | None = None,
        train_split: str = "train",
        val_splits: tuple[str, ...] = ("test",),
        val_packs: int = 8,
        overfit_packs: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        document_parallel: int = 1,
        chunk_size: int = 64,
        routing_words: RoutingWords = "question",
    ) -> None:
        super().__init__()
        self.corpora = {corpus: 1.0} if isinstance(corpus, str) else dict(corpus)
        self.curriculum = {0: document_tokens} if isinstance(document_tokens, int) else dict(document_tokens)
        self.negatives = dict(negatives or {})
        self._check(
            vocab_size=(vocab_size, 300), max_document_tokens=(max_document_tokens, 1), val_packs=(val_packs, 0),
            overfit_packs=(overfit_packs, 0), num_workers=(num_workers, 0), seed=(seed, 0),
            document_parallel=(document_parallel, 1), distractors=(distractors, 0),
        )  # fmt: skip
        if not 0 <= answer_share <= 1:
            raise UserError(f"data.answer_share is {answer_share}: give a share between 0 and 1")
        if queries_per_pack <= 0 or (queries_per_pack > 1 and queries_per_pack != int(queries_per_pack)):
            raise UserError(f"data.queries_per_pack is {queries_per_pack}: give a whole number, or a share below 1")
        self.tokenizer_name, self.vocab_size = tokenizer, vocab_size
        self.max_document_tokens = max_document_tokens
        self.train_split, self.val_splits = train_split, tuple(val_splits)
        self.val_packs, self.overfit_packs, self.num_workers = val_packs, overfit_packs, num_workers
        self.document_parallel = document_parallel
        self.routing_words: RoutingWords = routing_words
        last = self.curriculum[max(self.curriculum)]
        self.packing = PackingConfig(last, queries_per_pack, answer_share, chunk_size, seed, distractors)
        self.data: Collection | None = None

    def _check(self, **given: tuple[int, int]) -> None:
        for name, (value, least) in given.items():
            if value < least:
                raise UserError(f"data.{name} is {value}: give at least {least}")
        if not self.corpora or min(self.corpora.values()) <= 0:
            raise UserError("data.corpus: give at least one corpus, and every weight above 0")
        if min(self.curriculum, default=-1) != 0 or min(self.curriculum.values()) < 1:
            raise UserError("data.document_tokens: a curriculum begins at step 0, like {0: 8192, 4000: 65536}")
        if max(self.curriculum.values()) > LARGEST:
            raise UserError(
                f"data.document_tokens is {max(self.curriculum.values()):,}: give at most {LARGEST:,} for a pack"
            )
        if any(number < 1 for number in self.negatives.values()):
            raise UserError("data.negatives: give at least 1 per query, or leave the entry out")

    def prepare_data(self) -> None:
        """Builds what is kept on disk, on one process; nothing where `setup` has already opened it."""
        if self.data is None:
            self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Opens the stores, building those that are not there yet, and plans.

        Raises:
            UserError: Something is missing or malformed, or does not fit the budget or the number of ranks.
        """
        if self.trainer is not None:
            self.packs_at_once(self.trainer.world_size)
        if self.data is not None:
            return
        data = self.open()
        data.split(self.train_split)
        for split in self.val_splits:
            if data.instruction_Q[np.concatenate(data.split(split))].all():
                raise UserError(f"data.val_splits: '{split}' holds instructions alone; there is nothing to route")
        negatives = {} if stage == "mine" else self.negatives
        mined = [(self._mined(data, name), number) for name, number in negatives.items()]
        stages = {
            first: self._packer(data, self.train_split, replace(self.packing, document_tokens=budget), mined, number)
            for number, (first, budget) in enumerate(sorted(self.curriculum.items()))
        }
        self.packers = {split: self._packer(data, split, whole=True) for split in self.val_splits}
        self.stages, self.data = stages, data

    def open(self) -> Collection:
        """The corpora in token ids, tokenised now if they are not yet; the packing is not looked at."""
        tokenizer = (
            open_tokenizer(self.tokenizer_name)
            if self.tokenizer_name is not None
            else train_tokenizer(self._sample(), self.vocab_size, cache_root())
        )
        self.protocol = Protocol(tokenizer, self.routing_words)
        root = cache_root() / "stores"
        stores = [
            open_store(name, self.protocol, root, self.max_document_tokens, self.num_workers) for name in self.corpora
        ]
        return Collection(stores, tuple(self.corpora.values()))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer, with the control tokens."""
        return self.protocol.tokenizer

    def describe(self) -> str:
        """One line on what the run reads."""
        assert self.data is not None
        planner = self.stages[max(self.stages)].planner
        return (
            f"{self.data.documents:,} documents, {int(self.data.length_D.sum()):,} tokens; "
            f"{planner.queries:,} training queries in {planner.packs_per_epoch:,} packs an epoch"
            + (f", {self.document_parallel} ranks to a pack" if self.document_parallel > 1 else "")
        )

    def fingerprint(self) -> list[str]:
        """What tells the run's stores apart from those of other text, tokenizers and limits."""
        assert self.data is not None
        return [store.folder.name for store in self.data.stores]

    def pack(self) -> None:
        """Tokenises what is not tokenised yet, and prints what the stores hold and what packs become of them."""
        data = self.open()
        for store in data.stores:
            print_store(store)
        known = sorted({split for store in data.stores for split in store.splits})
        for split in (self.train_split, *self.val_splits):
            if split not in known:
                get_console().print(
                    f"{split:<12}no such split; the corpus has {', '.join(known)}: name one in data.train_split and "
                    "data.val_splits", soft_wrap=True, highlight=False, markup=False,
                )  # fmt: skip
            else:
                packer = self._packer(data, split, whole=split != self.train_split)
                sample = PackSample.of(packer)
                get_console().print(
                    f"{split:<12}{packer.packs_per_epoch:,} packs an epoch, {packer.planner.queries_per_pack} queries, "
                    f"{sample.documents:,.0f} documents, {sample.fill:.1%} of {self.packing.document_tokens:,} tokens",
                    soft_wrap=True, highlight=False, markup=False,
                )  # fmt: skip

    def mine(self, model: MemorySparseModel, folder: Path, pool_tokens: int) -> None:
        """Mines negatives of the training queries with a trained router."""
        assert self.data is not None
        mine_router(model, self._packer(self.data, self.train_split, whole=True), folder, pool_tokens)

    def longest(self) -> int:
        """Tokens that the longest document or context may have."""
        assert self.data is not None
        contexts = max(packer.planner.longest_context(self.protocol) for packer in self.stages.values())
        return max(int(self.data.length_D.max()) + self.protocol.wrapping(999), contexts)

    def packs_at_once(self, ranks: int) -> int:
        """Packs that so many ranks read at once.

        Raises:
            UserError: They cannot be shared out evenly.
        """
        packs, left = divmod(ranks, self.document_parallel)
        if left:
            raise UserError(
                f"data.document_parallel is {self.document_parallel}, which does not divide {ranks} "
                f"rank{'s' if ranks > 1 else ''}: change it, or trainer.devices and trainer.num_nodes"
            )
        return packs

    def examine(self, packs_per_step: int, steps: int) -> list[Finding]:
        """What can be known of the data before training; tokenises it if it is not yet."""
        self.setup()
        assert self.data is not None
        findings = list(examine_corpora(self.data, self.protocol))
        ends = [*sorted(self.stages)[1:], steps]
        for (first, packer), end in zip(sorted(self.stages.items()), ends, strict=True):
            name = f" from {first:,}" if len(self.stages) > 1 else ""
            if first >= steps:
                findings.append(
                    Finding("data", f"step{name}", f"never reached: the run has {steps:,} steps", "error",
                            "lower the step in data.document_tokens")
                )  # fmt: skip
                continue
            sample = PackSample.of(packer)
            findings += examine_packs(packer, sample, packs_per_step, min(end, steps) - first, name)
            if self.document_parallel > 1:
                own = sample.fill * packer.config.document_tokens / self.document_parallel
                findings.append(
                    Finding("data", f"shares{name}",
                            f"{self.document_parallel} ranks to a pack, {own:,.0f} document tokens each")
                )  # fmt: skip
        return findings + list(examine_splits(self.data, self.train_split, self.val_splits))

    def train_dataloader(self) -> DataLoader[MemoryPack]:
        """This rank's packs from the current step to the last."""
        trainer = self._trainer()
        accumulated = trainer.accumulate_grad_batches
        packs = self.packs_at_once(trainer.world_size) * accumulated
        steps = trainer.max_steps if trainer.max_steps > 0 else self.stages[0].packs_per_epoch // packs
        dataset = PackDataset(self.stages, packs, self.overfit_packs)
        return self._loader(dataset, trainer.global_step * accumulated, max(steps, 1) * accumulated)

    def val_dataloader(self) -> list[DataLoader[MemoryPack]]:
        """The first packs of every validation split."""
        return [self._evaluation(split, self.val_packs) for split in self.val_splits]

    def test_dataloader(self) -> list[DataLoader[MemoryPack]]:
        """All packs of every validation split."""
        return [self._evaluation(split, 0) for split in self.val_splits]

    def predict_dataloader(self) -> list[DataLoader[MemoryPack]]:
        """All packs of every validation split."""
        return self.test_dataloader()

    def evaluation_packs(self, split: str) -> list[tuple[Plan, MemoryPack]]:
        """All packs that a split is validated on, whichever ranks read them, with the rows that they hold."""
        packer = self.packers[split]
        return [(packer.plan(index), packer.pack(index)) for index in range(self._packs(split, self.val_packs))]

    def _packs(self, split: str, limit: int) -> int:
        whole = self.packers[split].packs_per_epoch
        return min(limit, whole) if limit else whole

    def _evaluation(self, split: str, limit: int) -> DataLoader[MemoryPack]:
        packs = self._packs(split, limit)
        # every rank runs as many, or collectives would wait for ever
        rounds = -(-packs // self.packs_at_once(self._trainer().world_size))
        dataset = _Evaluation(PackDataset({0: self.packers[split]}), packs)
        # selections are judged by the pack, so one rank reads all of its contexts
        return self._loader(dataset, 0, rounds, dealt=False)

    def _loader(self, dataset: Dataset[MemoryPack], start: int, stop: int, dealt: bool = True) -> PackLoader:
        trainer, ranks = self._trainer(), self.document_parallel
        place, rank = divmod(trainer.global_rank, ranks)
        return PackLoader(
            dataset if ranks == 1 else _Shared(dataset, rank, ranks, dealt),
            batch_size=None,
            sampler=StepSampler(start, stop, place, self.packs_at_once(trainer.world_size)),
            num_workers=self.num_workers,
            pin_memory=self._trainer().strategy.root_device.type == "cuda",
            persistent_workers=False,
        )

    def _packer(
        self,
        data: Collection,
        split: str,
        packing: PackingConfig | None = None,
        mined: Sequence[tuple[Mined, int]] = (),
        stage: int = 0,
        whole: bool = False,
    ) -> Packer:
        planner = Planner(data, self.protocol, split, packing or self.packing, mined, stage, whole)
        return Packer(planner, self.protocol)

    def _sample(self) -> list[str]:
        """Texts to train a tokenizer on."""
        stores = [name for name in self.corpora if is_store(Path(name))]
        if stores:
            raise UserError(f"data.tokenizer: give the tokenizer that the store '{stores[0]}' was packed with")
        texts: list[str] = []
        for name in self.corpora:
            reader = open_corpus(name)
            for records in (reader.documents(), reader.queries()):  # the words of questions as well
                room = SAMPLE // (2 * len(self.corpora))
                for record in records:
                    texts.append(encodable(record.text, record.id))
                    room -= len(record.text)
                    if room < 0:
                        break
        return texts

    def _mined(self, data: Collection, name: str) -> Mined:
        if name == BM25:
            return Mined(data, [mine_bm25(store) for store in data.stores])
        files = [mined_file(Path(name), store) for store in data.stores]
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise UserError(
                f"data.negatives: {missing} is missing; msa-train mine writes it, of the very corpus, "
                "data.max_document_tokens and data.tokenizer that it is to be used with"
            )
        return Mined(data, files)

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


class _Shared(Dataset[MemoryPack]):
    """One rank's shares of packs: cut here, on the host, so that a device never sees more."""

    def __init__(self, dataset: Dataset[MemoryPack], rank: int, ranks: int, dealt: bool) -> None:
        self.dataset, self.rank, self.ranks, self.dealt = dataset, rank, ranks, dealt

    def __getitem__(self, index: int) -> MemoryPack:
        return share(self.dataset[index], self.rank, self.ranks, self.dealt)
