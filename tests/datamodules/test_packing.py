"""Packs: complete, pure functions of their index, and never a positive among the negatives."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datamodules.corpus import Corpus, read_beir
from datamodules.packed_memory import PackedMemory, StepSampler
from datamodules.packing import PackDataset, Packer, PackingConfig, TokenizedCorpus
from datamodules.tokenizer import train_tokenizer
from msa_train.errors import UserError
from msa_train.pack import MemoryPack
from msa_train.protocol import Protocol

CONFIG = PackingConfig(document_tokens=512, queries_per_pack=5, answer_share=0.5, chunk_size=8, seed=3)


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> Protocol:
    texts = read_beir(corpus_folder).documents
    return Protocol(train_tokenizer(texts, 400, tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def data(protocol: Protocol, corpus_folder: Path) -> TokenizedCorpus:
    """The animals, but query 0 has three positives and documents 7 and 8 answer each other's queries too."""
    corpus = read_beir(corpus_folder)
    train = {**corpus.qrels["train"], 0: [0, 1, 2], 7: [7, 8], 8: [7, 8]}
    return TokenizedCorpus.of(Corpus(**{**vars(corpus), "qrels": {**corpus.qrels, "train": train}}), protocol)


@pytest.fixture(scope="module")
def packer(data: TokenizedCorpus, protocol: Protocol) -> Packer:
    return Packer(data, protocol, "train", CONFIG)


def same(left: MemoryPack, right: MemoryPack) -> bool:
    return (
        left.document_ids == right.document_ids
        and left.query_ids == right.query_ids
        and torch.equal(left.documents.tokens_T, right.documents.tokens_T)
        and torch.equal(left.contexts.tokens_A, right.contexts.tokens_A)
        and torch.equal(left.positive_QD, right.positive_QD)
    )


def test_each_query_once_an_epoch_and_in_another_order_the_next(packer: Packer) -> None:
    epochs = []
    for epoch in range(3):
        first = epoch * packer.packs_per_epoch
        packs = [packer.plan(index).queries for index in range(first, first + packer.packs_per_epoch)]
        assert Counter(sum(packs, [])) == Counter(packer.queries.tolist())
        epochs.append(packs)
    assert packer.packs_per_epoch == 13 and epochs[0] != epochs[1] != epochs[2]


def test_no_known_positive_is_a_negative_and_none_is_missing(packer: Packer, data: TokenizedCorpus) -> None:
    known = data.corpus.positives()
    seen = 0
    for index in range(60):
        pack, plan = packer.pack(index), packer.plan(index)
        for row, query in enumerate(plan.queries):
            marked = {plan.documents[place] for place in pack.positive_QD[row].nonzero().flatten().tolist()}
            assert marked == set(known[query])
            seen += len(marked)
        assert len(set(plan.documents)) == len(plan.documents)
    assert seen > 300


def test_budget_is_kept_and_nearly_filled(packer: Packer) -> None:
    sizes = [packer.pack(index).documents.tokens_T.numel() for index in range(40)]
    assert max(sizes) <= CONFIG.document_tokens and sum(sizes) / len(sizes) > 0.9 * CONFIG.document_tokens


def test_every_documents_text_comes_back(packer: Packer, data: TokenizedCorpus, protocol: Protocol) -> None:
    pack = packer.pack(4)
    texts = dict(zip(data.corpus.document_ids, data.corpus.documents, strict=True))
    offsets = pack.documents.offsets_D.tolist()
    for number, name in enumerate(pack.document_ids, start=1):
        ids = pack.documents.tokens_T[offsets[number - 1] : offsets[number]].tolist()
        assert protocol.tokenizer.decode(ids) == f"<|im_start|>[{number}]. {texts[name]}[{number}]<|im_end|>"


def test_targets_name_the_positives_and_stay_in_their_context(packer: Packer, protocol: Protocol) -> None:
    pack = packer.pack(2)
    contexts = pack.contexts
    for query in range(pack.queries):
        rows = contexts.label_query_N == query
        start, stop = contexts.offsets_Q[query + 1 : query + 3].tolist()
        places = contexts.label_index_N[rows]
        assert places.min() >= start and places.max() + 1 < stop
        assert torch.equal(contexts.tokens_A[places + 1], contexts.label_target_N[rows])
        numbers = "".join(f"[{place + 1}]" for place in pack.positive_QD[query].nonzero().flatten().tolist())
        text = protocol.tokenizer.decode(contexts.label_target_N[rows].tolist())
        assert text.startswith(numbers + "<|object_ref_end|>")
    offsets, ids = contexts.offsets_Q.tolist()[1:], contexts.tokens_A.tolist()
    bodies = [protocol.tokenizer.decode(ids[a:b]) for a, b in zip(offsets, offsets[1:], strict=False)]
    assert sum("The answer" in body for body in bodies) == round(0.5 * pack.queries)


def test_a_pack_is_a_pure_function_of_seed_and_index(packer: Packer, data: TokenizedCorpus, protocol: Protocol) -> None:
    again = Packer(data, protocol, "train", CONFIG)
    other = Packer(data, protocol, "train", replace(CONFIG, seed=4))
    for index in (17, 3, 17, 0):
        assert same(packer.pack(index), again.pack(index))
    assert not same(packer.pack(3), other.pack(3)) and not same(packer.pack(3), packer.pack(4))


def test_step_counts_are_those_of_all_its_packs(packer: Packer) -> None:
    whole = PackDataset(packer, packs_per_step=4)
    for index in range(12):
        assert packer.counts(index) == (len(packer.pack(index).contexts.label_target_N), packer.pack(index).queries)
        step = range(index // 4 * 4, index // 4 * 4 + 4)
        assert whole[index].step_labels == sum(packer.counts(i)[0] for i in step)
        assert whole[index].step_queries == sum(packer.counts(i)[1] for i in step)


def test_ranks_and_accumulation_share_one_global_order() -> None:
    """Two ranks with one accumulation and one rank with two read the same packs in a step."""
    for step in range(5):
        two = {i for rank in range(2) for i in list(StepSampler(step, step + 1, rank, 2))}
        assert two == set(StepSampler(2 * step, 2 * step + 2, 0, 1))


def test_what_does_not_fit_is_refused_before_training(data: TokenizedCorpus, protocol: Protocol) -> None:
    with pytest.raises(UserError, match="more than document_tokens 20"):
        Packer(data, protocol, "train", replace(CONFIG, document_tokens=20))
    with pytest.raises(UserError, match="lower queries_per_pack"):
        Packer(data, protocol, "train", replace(CONFIG, queries_per_pack=40))


def test_a_query_over_the_budget_is_named(data: TokenizedCorpus, protocol: Protocol) -> None:
    queries = [*data.queries]
    queries[2] = queries[2].repeat(200)
    with pytest.raises(UserError, match=r"query 'q2' has \d+ tokens, more than document_tokens 512"):
        Packer(replace(data, queries=queries), protocol, "train", CONFIG)


def test_overfitting_repeats_the_first_packs(packer: Packer) -> None:
    dataset = PackDataset(packer, packs_per_step=2, cycle=1)
    assert same(dataset[0], dataset[7])
    assert dataset[5].step_queries == 2 * packer.pack(0).queries


def test_packs_travel_to_spawned_workers(packer: Packer) -> None:
    """Where processes do not fork, a worker gets its dataset pickled."""
    there = pickle.loads(pickle.dumps(PackDataset(packer, packs_per_step=2)))  # noqa: S301
    assert same(there[5], packer.pack(5)) and there[5].step_queries == PackDataset(packer, 2)[5].step_queries


def test_unknown_split_lists_those_there_are(corpus_folder: Path) -> None:
    module = PackedMemory(str(corpus_folder), vocab_size=400, document_tokens=512, val_splits=("dev",))
    with pytest.raises(UserError, match="no split 'dev'; qrels/ has test, train"):
        module.setup()
