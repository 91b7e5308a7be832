"""Packs: complete, pure functions of their index, traceable to the source, and never a positive among the negatives."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.answers import holds_answer
from datamodules.beir import BeirReader
from datamodules.building import build_store
from datamodules.collection import Collection
from datamodules.mapped import MappedReader
from datamodules.negatives import Mined, keep_negatives, mine_bm25
from datamodules.packed_memory import PackedMemory, StepSampler
from datamodules.packing import PackDataset, Packer
from datamodules.planning import Asked, PackingConfig, Planner
from msa_train.errors import UserError
from msa_train.pack import MemoryPack
from msa_train.protocol import Protocol, restore
from tests.conftest import write_corpus
from tests.datamodules.corpora import LIMIT, write_instructions

CONFIG = PackingConfig(document_tokens=4096, queries_per_pack=7, answer_share=0.4, chunk_size=8, seed=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, folder: Path, protocol: Protocol) -> Collection:
    """The tangled corpus, a corpus that repeats some of its texts under other names, and instructions."""
    root = tmp_path_factory.mktemp("stores")
    twin = write_corpus(tmp_path_factory.mktemp("twin") / "twin", documents=30)
    with (twin / "corpus.jsonl").open("a") as out, (folder / "corpus.jsonl").open() as lines:
        for number, line in enumerate(lines):
            if number % 3 == 0:
                out.write(line.replace('"_id": "', '"_id": "twin-', 1))
    instructions = write_instructions(tmp_path_factory.mktemp("chat"))
    readers = (BeirReader(folder), BeirReader(twin), MappedReader(instructions))
    return Collection([build_store(reader, protocol, root, LIMIT) for reader in readers], (1.0, 1.5, 0.5))


@pytest.fixture(scope="module")
def packer(data: Collection, protocol: Protocol) -> Packer:
    return Packer(Planner(data, protocol, "train", CONFIG), protocol)


def same(left: MemoryPack, right: MemoryPack) -> bool:
    return (
        left.document_ids == right.document_ids
        and left.query_ids == right.query_ids
        and torch.equal(left.documents.tokens_T, right.documents.tokens_T)
        and torch.equal(left.contexts.tokens_A, right.contexts.tokens_A)
        and torch.equal(left.positive_QD, right.positive_QD)
        and torch.equal(left.excluded_QD, right.excluded_QD)
    )


def sources(data: Collection, query: int) -> set[str]:
    """Texts that are known to be relevant, worked out from the store's own columns."""
    number = int(np.searchsorted(data.first_query, query, side="right")) - 1
    store, place = data.stores[number], query - int(data.first_query[number])
    return {store.document(row, "text") for row in [*store.positives[place], *store.related[place]]}


def test_ten_thousand_packs_keep_every_promise(data: Collection, protocol: Protocol) -> None:
    """No known positive is a negative, nothing asked for is missing, no budget is passed, every query comes as often
    as its corpus' weight says; over 10,000 packs, all counted."""
    packer = Packer(Planner(data, protocol, "train", replace(CONFIG, document_tokens=2048)), protocol)
    planner, drawn = packer.planner, Counter[int]()
    positives = negatives = excluded = 0
    fill, wrapped = [], planner.wrapped
    text_of = [data.document_text(row) for row in range(data.documents)]
    known_of: dict[int, set[str]] = {}
    packs = 10_000
    for index in range(packs):
        plan = packer.plan(index)
        assert len(set(plan.documents)) == len(plan.documents)
        used = int(data.length_D[plan.documents].sum() + wrapped[len(plan.documents)])
        assert used <= 2048
        fill.append(used / 2048)
        positive_QD, excluded_QD = packer._relevance(plan)
        assert not (positive_QD & excluded_QD).any()
        negative_QD = ~(positive_QD | excluded_QD)
        for row, asked in enumerate(plan.asked):
            drawn[asked.query] += 1
            if not asked.steps:
                assert excluded_QD[row].all()
                continue
            wanted = {plan.documents[place] for place in positive_QD[row].nonzero().flatten().tolist()}
            assert wanted == set(asked.steps[-1]) and wanted
            known = known_of.setdefault(asked.query, sources(data, asked.query))
            wrong = [
                place
                for place in negative_QD[row].nonzero().flatten().tolist()
                if text_of[plan.documents[place]] in known
            ]
            assert wrong == []
            positives += len(wanted)
        negatives += int(negative_QD.sum())
        excluded += int(excluded_QD.sum())
    assert positives > 60_000 and negatives > 1_000_000 and excluded > 10_000
    assert sum(fill) / packs >= 0.99, f"budget met to {sum(fill) / packs:.4f}"
    epochs = packs / packer.packs_per_epoch
    for number, weight in enumerate(data.weights):
        times = [drawn[query] for query in planner.rows[number].tolist()]
        assert max(times) - min(times) <= 2 and abs(np.mean(times) / (weight * epochs) - 1) < 0.05


def test_each_query_as_often_as_its_weight_and_in_another_order_the_next_epoch(packer: Packer) -> None:
    epochs = []
    for epoch in range(3):
        first = epoch * packer.packs_per_epoch
        packs = [[one.query for one in packer.plan(first + n).asked] for n in range(packer.packs_per_epoch)]
        times = Counter(sum(packs, []))
        tangled, twin, chat = packer.planner.rows
        assert all(times[query] == 1 for query in tangled) and len(tangled) == 192
        assert {times[query] for query in twin} == {1, 2} and sum(times[query] for query in twin) == 36
        assert {times[query] for query in chat} == {0, 1} and sum(times[query] for query in chat) == 10
        epochs.append(packs)
    assert epochs[0] != epochs[1] != epochs[2]
    both = Counter(query for packs in epochs[:2] for pack in packs for query in pack)
    assert all(both[query] == 3 for query in twin) and all(both[query] == 1 for query in chat)


def test_every_token_of_a_pack_is_traced_to_its_source(packer: Packer, data: Collection, protocol: Protocol) -> None:
    decode = protocol.tokenizer.decode
    for index in range(5):
        pack, plan = packer.pack(index), packer.plan(index)
        offsets, tokens = pack.documents.offsets_D.tolist(), pack.documents.tokens_T.tolist()
        assert offsets[-1] == len(tokens) <= CONFIG.document_tokens
        for number, row in enumerate(plan.documents, start=1):
            text = restore(decode(tokens[offsets[number - 1] : offsets[number]]))
            assert text == f"<|im_start|>[{number}]. {data.document_text(row)}[{number}]<|im_end|>"
        ids, bounds = pack.contexts.tokens_A.tolist(), pack.contexts.offsets_Q.tolist()
        assert decode(ids[: bounds[1]]) == "<|im_start|>user\n"
        for asked, start, stop in zip(plan.asked, bounds[1:], bounds[2:], strict=False):
            assert restore(decode(ids[start:stop])) == context_text(data, plan.documents, asked)


def context_text(data: Collection, documents: list[int], asked: Asked) -> str:
    """A context as shared/protocol words it, written without the packer."""
    question, answer = data.query(asked.query, "text"), (data.query(asked.query, "answers") or [""])[0]
    if not asked.steps:
        return f"{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    text = (
        "\nPlease answer the question based on the above historical document information\n\n"
        f"{question}\nPlease return all documents related to the question\n<|im_end|>\n<|im_start|>"
    )
    for number, step in enumerate(asked.steps):
        places = sorted(documents.index(row) + 1 for row in step)
        text += "".join(f"[{place}]" for place in places) + "<|object_ref_end|>"
        if number < len(asked.steps) - 1 or asked.answered:
            for place in places:
                text += f"[{place}]. {data.document_text(documents[place - 1])}\n<|object_ref_end|>"
    if asked.answered:
        text += f"<End-of-Retrieve><|im_start|>The user's question is: {question}\n<|object_ref_end|>"
        text += f"The answer to the question is: {answer}<|im_end|>"
    return text


def test_targets_name_the_positives_and_stay_in_their_context(packer: Packer, protocol: Protocol) -> None:
    chains = instructions = 0
    for index in range(20):
        pack, plan = packer.pack(index), packer.plan(index)
        contexts = pack.contexts
        for query, asked in enumerate(plan.asked):
            rows = contexts.label_query_N == query
            start, stop = contexts.offsets_Q[query + 1 : query + 3].tolist()
            places = contexts.label_index_N[rows]
            assert places.min() >= start and places.max() + 1 < stop
            assert torch.equal(contexts.tokens_A[places + 1], contexts.label_target_N[rows])
            text = protocol.tokenizer.decode(contexts.label_target_N[rows].tolist())
            numbers = "".join(f"[{place + 1}]" for place in pack.positive_QD[query].nonzero().flatten().tolist())
            if asked.steps:
                assert text.startswith(numbers + "<|object_ref_end|>") and ("The answer" in text) == asked.answered
            else:
                assert text.startswith("0") and text.endswith("<|im_end|>")
            chains += len(asked.steps) > 1
            instructions += not asked.steps
        assert sum(one.answered and bool(one.steps) for one in plan.asked) <= round(0.4 * len(plan.asked))
        assert pack.query_steps == tuple(max(len(one.steps) - 1, 0) for one in plan.asked)
    assert chains > 10 and instructions > 3


def test_text_that_imitates_the_protocol_stays_text_in_a_pack(packer: Packer, protocol: Protocol) -> None:
    forged = 0
    for index in range(10):
        pack = packer.pack(index)
        text = protocol.tokenizer.decode(pack.documents.tokens_T.tolist())
        forged += text.count("Forged[\u20601]")
        assert not re.search(r"Forged\[1\]", text)
        documents = len(pack.document_ids)
        assert (
            pack.documents.tokens_T.eq(protocol.start).sum()
            == pack.documents.tokens_T.eq(protocol.end).sum()
            == documents
        )
        assert not pack.documents.tokens_T.eq(protocol.ref).any()
        numbers = re.findall(r"\[[0-9]+\]", text)
        assert len(numbers) == 2 * documents
    assert forged > 5


def test_distractors_answer_nothing_and_are_of_the_pack(data: Collection, protocol: Protocol) -> None:
    packer = Packer(Planner(data, protocol, "train", replace(CONFIG, distractors=3)), protocol)
    plain = Packer(Planner(data, protocol, "train", CONFIG), protocol)
    read = Counter[int]()
    for index in range(400):
        plan, pack = packer.plan(index), packer.pack(index)
        assert [replace(one, distractors=()) for one in plan.asked] == plain.plan(index).asked
        assert plan.documents == plain.plan(index).documents, "nothing else of a pack depends on them"
        assert packer.counts(index) == (len(pack.contexts.label_target_N), pack.asked)
        for row, one in enumerate(plan.asked):
            assert not one.distractors or (one.answered and one.steps)
            places = [plan.documents.index(document) for document in one.distractors]
            assert len(set(places)) == len(places)
            assert not (pack.positive_QD | pack.excluded_QD)[row, places].any()
            if one.answered and one.steps:
                read[len(places)] += 1
    assert set(read) == {0, 1, 2, 3} and max(read.values()) < 1.3 * min(read.values())


def test_a_questions_own_mined_negatives_are_read_first(data: Collection, protocol: Protocol) -> None:
    mined = Mined(data, [mine_bm25(store) for store in data.stores])
    planner = Planner(data, protocol, "train", replace(CONFIG, distractors=3), [(mined, 2)])
    held = full = 0
    for index in range(200):
        plan = planner.plan(index)
        for one in plan.asked:
            own = [row for row in mined.of(one.query) if row in plan.documents]
            assert list(one.distractors[: len(own)]) == own[: len(one.distractors)]
            held += bool(own and one.distractors)
            full += len(one.distractors) > len(own) > 0
    assert held > 50 and full > 3


def test_what_is_found_together_is_read_in_the_order_of_its_corpus(packer: Packer) -> None:
    together, mixed = 0, 0
    for index in range(300):
        plan = packer.plan(index)
        number = {row: place for place, row in enumerate(plan.documents)}
        steps = [set(step) for one in plan.asked for step in one.steps if len(step) > 1]
        for step in steps:
            places = [number[row] for row in sorted(step)]
            assert places == sorted(places)
            together += 1
            alone = [other for other in steps if not step & other]
            mixed += any(number[min(other)] < number[min(step)] for other in alone if min(other) > max(step))
    assert together > 100 and mixed > 20, "documents of different questions stand in no order"


def test_a_documents_number_carries_no_meaning(packer: Packer) -> None:
    """Over many packs the same document stands everywhere."""
    places: dict[int, list[float]] = {}
    for index in range(300):
        plan = packer.plan(index)
        for number, row in enumerate(plan.documents):
            places.setdefault(row, []).append(number / (len(plan.documents) - 1))
    means = [np.mean(found) for found in places.values() if len(found) > 40]
    assert len(means) > 50 and abs(np.mean(means) - 0.5) < 0.02 and max(abs(mean - 0.5) for mean in means) < 0.2


def test_a_pack_is_a_pure_function_of_seed_and_index(packer: Packer, data: Collection, protocol: Protocol) -> None:
    again = Packer(Planner(data, protocol, "train", CONFIG), protocol)
    other = Packer(Planner(data, protocol, "train", replace(CONFIG, seed=4)), protocol)
    later = Packer(Planner(data, protocol, "train", CONFIG, stage=1), protocol)
    for index in (17, 3, 170, 0):
        assert same(packer.pack(index), again.pack(index))
    for different in (other.pack(3), later.pack(3), packer.pack(4)):
        assert not same(packer.pack(3), different)


def test_step_counts_are_those_of_all_its_packs(packer: Packer) -> None:
    whole = PackDataset({0: packer}, packs_per_step=4)
    for index in range(12):
        pack = packer.pack(index)
        assert packer.counts(index) == (len(pack.contexts.label_target_N), pack.asked)
        assert pack.asked == int(pack.positive_QD.any(1).sum())
        step = range(index // 4 * 4, index // 4 * 4 + 4)
        assert whole[index].step_labels == sum(packer.counts(i)[0] for i in step)
        assert whole[index].step_queries == sum(packer.counts(i)[1] for i in step)


def test_a_curriculum_changes_packers_at_its_step(data: Collection, protocol: Protocol) -> None:
    small = Packer(Planner(data, protocol, "train", replace(CONFIG, document_tokens=2048), stage=0), protocol)
    large = Packer(Planner(data, protocol, "train", CONFIG, stage=1), protocol)
    dataset = PackDataset({0: small, 3: large}, packs_per_step=2)
    assert same(dataset[5], small.pack(5)) and same(dataset[6], large.pack(0)) and same(dataset[9], large.pack(3))
    assert dataset[6].index == 6 and dataset[6].step_queries == large.counts(0)[1] + large.counts(1)[1]


def test_ranks_and_accumulation_share_one_global_order() -> None:
    """Two ranks with one accumulation and one rank with two read the same packs in a step."""
    for step in range(5):
        two = {i for rank in range(2) for i in list(StepSampler(step, step + 1, rank, 2))}
        assert two == set(StepSampler(2 * step, 2 * step + 2, 0, 1))


def test_what_does_not_fit_is_refused_before_training(data: Collection, protocol: Protocol) -> None:
    with pytest.raises(UserError, match=r"more than document_tokens 20 .*lower max_document_tokens"):
        Packer(Planner(data, protocol, "train", replace(CONFIG, document_tokens=20)), protocol)
    with pytest.raises(UserError, match="lower queries_per_pack"):
        Packer(Planner(data, protocol, "train", replace(CONFIG, queries_per_pack=100)), protocol)


def test_queries_as_a_share_of_tokens(data: Collection, protocol: Protocol) -> None:
    packer = Packer(Planner(data, protocol, "train", replace(CONFIG, queries_per_pack=0.25)), protocol)
    packs = [packer.pack(index) for index in range(packer.packs_per_epoch)]
    share = np.mean([pack.contexts.tokens_A.numel() / CONFIG.document_tokens for pack in packs])
    assert 0.2 < share < 0.28 and packs[0].queries > 2


def test_queries_as_a_share_of_tokens_count_what_answered_ones_read(data: Collection, protocol: Protocol) -> None:
    """Where a part of the queries may be answered, these are answered the more often; and distractors are read."""
    for share, distractors in ((0.25, 0), (0.5, 0), (0.5, 4), (0.9, 4)):
        config = replace(CONFIG, queries_per_pack=share, distractors=distractors)
        packer = Packer(Planner(data, protocol, "train", config), protocol)
        packs = [packer.pack(index) for index in range(packer.packs_per_epoch - 1)]  # the last may have fewer
        found = np.mean([pack.contexts.tokens_A.numel() / CONFIG.document_tokens for pack in packs])
        assert found == pytest.approx(share, rel=0.15)


def test_overfitting_repeats_the_first_packs(packer: Packer) -> None:
    dataset = PackDataset({0: packer}, packs_per_step=2, cycle=1)
    assert same(dataset[0], dataset[7])
    assert dataset[5].step_queries == 2 * packer.pack(0).asked


def test_packs_travel_to_spawned_workers(data: Collection, protocol: Protocol) -> None:
    """Where processes do not fork, a worker gets its dataset pickled; the store is mapped again, not copied."""
    mined = Mined(data, [mine_bm25(store) for store in data.stores])
    dataset = PackDataset(
        {0: Packer(Planner(data, protocol, "train", CONFIG, [(mined, 2)]), protocol)}, packs_per_step=2
    )
    there = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert same(there[5], dataset[5]) and there[5].step_queries == dataset[5].step_queries


def test_mined_negatives_hold_no_answer_and_join_the_pack(data: Collection, protocol: Protocol) -> None:
    mined = Mined(data, [mine_bm25(store) for store in data.stores])
    packer = Packer(Planner(data, protocol, "train", CONFIG, [(mined, 3)]), protocol)
    brought = checked = 0
    for query in np.concatenate(packer.planner.rows).tolist():
        found, known = mined.of(query), sources(data, query)
        for row in found:
            text = data.document_text(row)
            assert text not in known and not holds_answer(text, data.query(query, "answers"))
            checked += 1
    for index in range(20):
        plan = packer.plan(index)
        for one in plan.asked:
            brought += len(set(mined.of(one.query)) & set(plan.documents)) >= min(3, len(mined.of(one.query)))
    assert checked > 200 and brought > 80


def test_a_negative_scores_well_below_every_positive() -> None:
    """Positives score 10 and 8: 95% of 8 is 7.6. The answer's words rule document 3 out."""
    texts = {1: "a", 2: "b", 3: "the ANSWER", 4: "d", 5: "e"}
    found = keep_negatives(
        [(1, 9.0), (2, 7.7), (3, 7.0), (4, 6.0), (5, 5.0)], [10.0, 8.0], {5}, ["answer"], texts.__getitem__
    )
    assert found == [4]
    assert keep_negatives([(1, -0.2), (2, -0.12)], [-0.1], set(), [], texts.__getitem__) == [1, 2]
    assert keep_negatives([(1, -0.1), (2, -0.2)], [-0.1], set(), [], texts.__getitem__) == [2]


def test_one_query_a_pack_answers_as_often_as_asked(data: Collection, protocol: Protocol) -> None:
    packer = Packer(Planner(data, protocol, "train", replace(CONFIG, queries_per_pack=1, answer_share=0.25)), protocol)
    asked = [packer.plan(index).asked[0] for index in range(2 * packer.packs_per_epoch)]
    may = [one for one in asked if one.steps and data.answer(one.query) is not None]
    assert 0.18 < np.mean([one.answered for one in may]) < 0.32 and len(may) > 150


def test_an_evaluation_counts_every_query_once_whatever_its_corpus_weighs(data: Collection, protocol: Protocol) -> None:
    packer = Packer(Planner(data, protocol, "test", CONFIG, whole=True), protocol)
    times = Counter(one.query for index in range(packer.packs_per_epoch) for one in packer.plan(index).asked)
    assert set(times.values()) == {1} and len(times) == 48 + 6


def test_an_answer_over_the_budget_is_named(data: Collection, protocol: Protocol, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "long", documents=10)
    text = (folder / "queries.jsonl").read_text().replace("by river 3", "far away " * 300)
    (folder / "queries.jsonl").write_text(text)
    store = build_store(BeirReader(folder), protocol, tmp_path, 60)
    with pytest.raises(UserError, match=r"query 'q3''s answer has \d+ tokens, more than document_tokens 400"):
        Packer(
            Planner(
                Collection([store], [1.0]), protocol, "train", replace(CONFIG, document_tokens=400, queries_per_pack=2)
            ),
            protocol,
        )


def test_unknown_split_lists_those_there_are(corpus_folder: Path) -> None:
    module = PackedMemory(str(corpus_folder), vocab_size=400, document_tokens=512, val_splits=("dev",))
    with pytest.raises(UserError, match="no split 'dev'; the corpus has test, train"):
        module.setup()
