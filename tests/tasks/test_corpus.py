"""Tasks over a corpus: memories of nested pools with all that is asked for, and nothing beside that answers it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.packed_memory import PackedMemory
from datamodules.tasks.corpus import AnswerTask, CorpusTask, RetrievalTask
from msa_train.errors import UserError
from msa_train.evaluation.task import Memory
from tests.conftest import write_corpus
from tests.datamodules.corpora import LIMIT, write_instructions, write_tangled_corpus

LENGTHS = (700, 1500, 3100, 6300)


def source_of(name: str) -> str:
    """The document that a name tells of, where it is a part's."""
    return re.sub(r"#[0-9]+$", "", name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chains, several positives, copies, documents in parts."""
    return write_tangled_corpus(tmp_path_factory.mktemp("corpora") / "tangled")


def packed(corpus: Any, **given: Any) -> PackedMemory:
    given = {"vocab_size": 400, "max_document_tokens": LIMIT, "document_tokens": 2048, "queries_per_pack": 3, **given}
    data = PackedMemory(corpus, **given)
    data.setup()
    return data


@pytest.fixture(scope="module")
def data(folder: Path) -> PackedMemory:
    return packed(str(folder))


def opened(task: CorpusTask, data: PackedMemory) -> CorpusTask:
    task.open(data.protocol, data)
    return task


def retrieval(data: PackedMemory, **given: Any) -> CorpusTask:
    return opened(RetrievalTask(**{"questions": 40, "per_memory": 5, **given}), data)


def memories(task: CorpusTask, length: int) -> list[Memory]:
    found = [Memory(task.pool(length), trial) for trial in task.trials(length)]
    assert found
    return found


def documents(memory: Memory) -> list[Any]:
    """Name, words and token ids of every document, by number."""
    return [
        (number, passage.id, passage.text, list(passage.tokens))
        for number in memory.numbers
        for passage in [memory.passage(number)]
    ]


class Relations:
    """What the corpus' files say, read without the code that is tested."""

    def __init__(self, folder: Path, split: str = "test") -> None:
        def read(name: str) -> dict[str, Any]:
            return {line["_id"]: line for line in map(json.loads, (folder / name).read_text().splitlines())}

        self.documents, self.queries = read("corpus.jsonl"), read("queries.jsonl")
        self.texts = {name: f"{line['title']} {line['text']}" for name, line in self.documents.items()}
        first = {text: name for name, text in reversed(self.texts.items())}
        self.name = {name: first[text] for name, text in self.texts.items()}  # copies go by the first one's name
        self.relevant: dict[str, set[str]] = {}
        for file in (folder / "qrels").glob("*.tsv"):
            for line in file.read_text().splitlines()[1:]:
                query, document, _ = line.split("\t")
                self.relevant.setdefault(query, set()).add(self.name[document])
        rows = (folder / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]
        self.split = {row.split("\t")[0] for row in rows}

    def steps(self, query: str) -> set[str]:
        """Documents of all steps; of a question without steps, the relevant ones."""
        chain = self.queries[query].get("steps")
        return {self.name[name] for step in chain for name in step} if chain else self.relevant[query]


@pytest.fixture(scope="module")
def relations(folder: Path) -> Relations:
    return Relations(folder)


# --- the pool ----------------------------------------------------------------------------------------------------


def test_a_shorter_memory_s_pool_is_the_beginning_of_a_longer_one_s(data: PackedMemory) -> None:
    task = retrieval(data)
    pools = [task.pool(length) for length in LENGTHS]
    names = [[passage.id for passage in pool] for pool in pools]
    assert 0 < len(names[0]) < len(names[1]) < len(names[2]) < len(names[3])
    written = {data.data.document_id(row): row for row in range(data.data.documents)} if data.data else {}
    order = [written[name] for name in names[-1]]
    assert abs(float(np.corrcoef(order, range(len(order)))[0, 1])) < 0.5, "in no order"
    for shorter, longer in zip(names, names[1:], strict=False):
        assert longer[: len(shorter)] == shorter
    for length, pool in zip(LENGTHS, pools, strict=True):
        for memory in memories(task, length):
            assert memory.trial.pool <= len(pool)
            assert documents(Memory(pools[-1], memory.trial)) == documents(memory), "whichever pool it is read from"


def test_everything_follows_from_the_seed(data: PackedMemory) -> None:
    def told(task: CorpusTask, length: int) -> list[Any]:
        return [(memory.trial.asked, documents(memory)) for memory in memories(task, length)]

    state = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    one, again, other = retrieval(data), retrieval(data), retrieval(data, seed=1)
    told(again, 1500)  # what was asked before does not matter
    assert told(one, 3100) == told(again, 3100) == told(one, 3100)
    assert told(one, 3100) != told(other, 3100) and one.pool_name != other.pool_name
    assert state == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_tasks_with_the_same_questions_share_their_pool(data: PackedMemory) -> None:
    both = {"questions": 500}
    everything, answered = retrieval(data, **both), opened(AnswerTask(**both), data)
    assert everything.pool_name != answered.pool_name, "half of the questions have no answer"
    few = retrieval(data, **both, per_memory=2)
    assert few.pool_name == everything.pool_name
    shorter, longer = sorted((few.pool(1500), everything.pool(1500)), key=len)
    assert [p.id for p in shorter] == [p.id for p in longer[: len(shorter)]] and len(shorter) < len(longer)
    assert {few.name, answered.name} == {"retrieval_test", "answers_test"}
    assert RetrievalTask(name="mine").name == "mine" and AnswerTask(split="dev").name == "answers_dev"


# --- what a memory holds -----------------------------------------------------------------------------------------


def assert_whole(task: CorpusTask, memory: Memory, length: int) -> None:
    """Numbered through, as long as it says, and not longer than asked for."""
    trial, found = memory.trial, documents(memory)
    assert memory.numbers == list(range(1, len(found) + 1))
    assert trial.tokens == sum(len(tokens) for *_, tokens in found) <= length
    others = [text for number, _, text, _ in found if number not in trial.own]
    assert len({name for _, name, *_ in found}) == len(found) and len(set(others)) == len(others)
    assert not {passage.text for passage in trial.own.values()} & set(others)
    assert trial.asked and set(trial.own) == {number for asked in trial.asked for number in asked.gold}


@pytest.mark.parametrize("per_memory", [1, 5, 16])
def test_a_memory_is_never_longer_than_its_length_and_nearly_as_long(data: PackedMemory, per_memory: int) -> None:
    task = retrieval(data, per_memory=per_memory)
    for length in LENGTHS[1:]:
        for memory in memories(task, length):
            assert_whole(task, memory, length)
            # at most: every document that gave its place was longer than the one that took it; and one more did not fit
            assert memory.trial.tokens > length - LIMIT * (len(memory.trial.own) + 1)


def test_it_is_whole_at_any_length_up_to_the_last_document(data: PackedMemory) -> None:
    task = retrieval(data, questions=12)
    reach, seen = task.reach(), 0
    assert reach == sum(len(passage.tokens) for passage in task.pool(1 << 30)) > 5000
    for length in (*range(700, 1000, 37), *range(reach - 900, reach + 1, 75), reach):
        for memory in memories(task, length):
            assert_whole(task, memory, length)
            seen += 1
    assert seen > 60


def test_a_memory_of_nearly_everything_has_no_gap(tmp_path: Path) -> None:
    """Short documents that answer leave room for more of them than the pool has places."""
    folder = write_corpus(tmp_path / "short", documents=30)
    lines = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    for line in lines[24:]:  # those of the test split
        line.update(title="", text=f"{line['_id']}")
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    task = retrieval(packed(str(folder), document_tokens=900), per_memory=6)
    reach, most = task.reach(), 0
    for length in range(reach - 120, reach + 1, 4):
        (memory,) = memories(task, length)
        assert_whole(task, memory, length)
        most = max(most, len(memory.numbers))
    assert 24 <= most <= 30


def test_documents_that_answer_stand_anywhere_and_elsewhere_at_every_length(data: PackedMemory) -> None:
    task = retrieval(data, questions=500, per_memory=1)
    short, long = ([memory.trial for memory in memories(task, length)] for length in (1500, 6300))
    depths = [trial.asked[0].depth for trial in long]
    assert len(depths) > 40 and min(depths) < 0.1 and max(depths) > 0.7
    first = [min(trial.asked[0].gold) == 1 for trial in short]
    assert sum(first) < len(first) / 2
    assert len({trial.asked[0].gold for trial in long}) > len(long) / 2
    single = [trial.asked[0].depth for trial in long if len(trial.asked[0].gold) == 1]
    assert 0.3 < sum(single) / len(single) < 0.7
    assert [trial.asked[0].id for trial in short] == [trial.asked[0].id for trial in long]


def test_a_depth_is_the_share_of_the_tokens_before_the_first_gold_document(data: PackedMemory) -> None:
    for memory in memories(retrieval(data), 1500):
        sizes = [len(tokens) for *_, tokens in documents(memory)]
        for asked in memory.trial.asked:
            assert asked.depth == pytest.approx(sum(sizes[: min(asked.gold) - 1]) / sum(sizes))


# --- who answers what --------------------------------------------------------------------------------------------


def test_gold_numbers_are_those_of_the_documents_that_answer(data: PackedMemory, relations: Relations) -> None:
    task = retrieval(data, questions=500)
    chains = several = parts = 0
    asked_names = []
    for length in (1500, 6300):
        for memory in memories(task, length):
            for asked in memory.trial.asked:
                gold = [memory.passage(number) for number in asked.gold]
                assert len(set(asked.gold)) == len(gold) > 0
                assert {source_of(passage.id) for passage in gold} == relations.steps(asked.id)
                for passage in gold:
                    assert passage.text in relations.texts[source_of(passage.id)]
                assert asked.text == relations.queries[asked.id]["text"]
                assert asked.answers == tuple(relations.queries[asked.id].get("answers", ()))
                chains += len(relations.queries[asked.id].get("steps", ())) > 1
                several += len(relations.steps(asked.id)) > 1 and "steps" not in relations.queries[asked.id]
                parts += len(gold) > len({source_of(passage.id) for passage in gold})
                asked_names.append(asked.id)
    assert sorted(asked_names) == sorted([*relations.split] * 2), "every question of the split, at both lengths"
    assert chains > 10 and several > 3 and parts > 3


@pytest.mark.parametrize("per_memory", [1, 16])
def test_nothing_beside_the_gold_is_known_as_relevant_or_is_its_copy(
    data: PackedMemory, relations: Relations, per_memory: int
) -> None:
    """Not in the pool, and not among the documents that answer the other questions of a memory."""
    task = retrieval(data, questions=500, per_memory=per_memory)
    answering = {name for query in relations.split for name in relations.steps(query)}
    assert not answering & {source_of(passage.id) for passage in task.pool(1 << 30)}
    seen = 0
    for memory in memories(task, 6300):
        for asked in memory.trial.asked:
            gold = {memory.passage(number).text for number in asked.gold}
            for number, name, text, _ in documents(memory):
                if number not in asked.gold:
                    seen += 1
                    assert text not in gold
                    assert source_of(name) not in relations.relevant[asked.id], (asked.id, name)
    assert seen > 5000


def test_only_questions_with_an_answer_are_answered(data: PackedMemory, relations: Relations) -> None:
    task = opened(AnswerTask(questions=500), data)
    asked = [asked for memory in memories(task, 6300) for asked in memory.trial.asked]
    assert {one.id for one in asked} == {name for name in relations.split if "answers" in relations.queries[name]}
    assert all(one.answers == (f"{one.id[1:]}.",) for one in asked)
    one = asked[0]
    assert task.score(one, f"The {one.answers[0]}") == {"exact_match": 1.0, "f1": 1.0}
    assert task.score(one, f"{one.answers[0]} or so") == {"exact_match": 0.0, "f1": 0.5}
    assert task.score(one, "") == {"exact_match": 0.0, "f1": 0.0}
    grade = replace(one, answers=("A",))  # SQuAD leaves articles out, and then nothing is left of it
    assert task.score(grade, "A")["f1"] == 1.0 and task.score(grade, " ")["f1"] == task.score(grade, "B")["f1"] == 0.0
    assert task.metric in task.score(one, "") and task.answers and not RetrievalTask().answers


def test_as_many_questions_as_wanted_so_many_to_a_memory(data: PackedMemory, relations: Relations) -> None:
    def asked(task: CorpusTask) -> list[list[str]]:
        return [[one.id for one in trial.asked] for trial in task.trials(6300)]

    few = asked(retrieval(data, questions=17, per_memory=5))
    assert sum(map(len, few)) == 17 and max(map(len, few)) <= 5 and len(few) >= 4
    names = [name for group in few for name in group]
    assert len(set(names)) == 17 and set(names) < relations.split
    other = [name for group in asked(retrieval(data, questions=17, seed=2)) for name in group]
    assert set(other) != set(names)


# --- several corpora ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twin(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other documents and other questions, and a third of the run's own documents under other names."""
    path = write_corpus(tmp_path_factory.mktemp("twin") / "twin", documents=50)
    with (path / "corpus.jsonl").open("a") as out, (folder / "corpus.jsonl").open() as lines:
        for number, line in enumerate(lines):
            if number % 3 == 0:
                out.write(line.replace('"_id": "', '"_id": "copy-of-', 1))
    return path


def test_further_corpora_fill_up_but_are_not_asked(data: PackedMemory, relations: Relations, twin: Path) -> None:
    alone, wide = retrieval(data, questions=500), retrieval(data, questions=500, distractors=(str(twin),))
    ids = [passage.id for passage in wide.pool(1 << 30)]
    assert wide.reach() > alone.reach() and wide.pool_name != alone.pool_name
    assert sum(name.startswith("twin/") for name in ids) > 40 < sum(name.startswith("tangled/") for name in ids)
    for memory in memories(wide, 6300):
        assert_whole(wide, memory, 6300)
        for asked in memory.trial.asked:
            assert asked.id in relations.split and asked.text == relations.queries[asked.id]["text"]
            names = {memory.passage(number).id for number in asked.gold}
            assert {source_of(name.removeprefix("tangled/")) for name in names} == relations.steps(asked.id)
    own = {passage.text for memory in memories(wide, 6300) for passage in memory.trial.own.values()}
    assert not own & {passage.text for passage in wide.pool(1 << 30)}
    answering = {name for query in relations.split for name in relations.steps(query)}
    assert answering & set(list(relations.texts)[::3]), "the twin has copies of documents that answer"


def test_another_corpus_than_the_run_s_can_be_asked(data: PackedMemory, twin: Path) -> None:
    task = retrieval(data, corpus=str(twin), questions=500, per_memory=3)
    for memory in memories(task, 900):
        assert_whole(task, memory, 900)
        for asked in memory.trial.asked:
            parts = [memory.passage(number) for number in asked.gold]
            assert {source_of(part.id) for part in parts} == {f"d{asked.id[1:]}"}
            assert parts[0].text.startswith(asked.text.removeprefix("Where does the ").removesuffix(" live?"))


def test_copies_across_corpora_that_answer_are_not_in_one_memory(
    folder: Path, twin: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two corpora of a run ask about one text each under its own name."""
    other = tmp_path_factory.mktemp("other") / "other"
    (other / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv", "qrels/train.tsv"):
        (other / name).write_text((folder / name).read_text())
    task = retrieval(packed({str(folder): 1.0, str(other): 1.0}), questions=500, per_memory=16)
    asked = 0
    for memory in memories(task, 6300):
        assert_whole(task, memory, 6300)
        asked += len(memory.trial.asked)
    assert asked == 96, "each question of both"


def test_instructions_are_not_asked(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    chat = write_instructions(tmp_path_factory.mktemp("chat"))
    data = packed({str(folder): 1.0, str(chat): 1.0})
    task = retrieval(data, split="train", questions=1000)
    asked = [asked for memory in memories(task, 6300) for asked in memory.trial.asked]
    relations = Relations(folder, "train")
    assert {one.id for one in asked} == relations.split and not any("Count to" in one.text for one in asked)
    assert all(one.gold for one in asked)
    with pytest.raises(UserError, match="RetrievalTask: split 'train' has no question that it can ask"):
        retrieval(data, corpus=str(chat), split="train", distractors=(str(folder),))


# --- what does not go --------------------------------------------------------------------------------------------


def test_a_corpus_whose_documents_all_answer_reaches_nowhere(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "small", documents=10)
    (folder / "qrels" / "test.tsv").write_text((folder / "qrels" / "train.tsv").read_text())
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq9\td9\t1\n")
    data = packed(str(folder), document_tokens=400)
    task = retrieval(data)
    assert 0 < task.reach() < 200 and len(task.pool(1 << 20)) == 2
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t1\n" for n in range(10))
    )
    task = retrieval(packed(str(folder), document_tokens=400))
    assert task.reach() == 0 and len(task.pool(1 << 20)) == 0


def test_a_memory_too_short_for_its_answers_is_refused_with_the_mend(data: PackedMemory) -> None:
    task = retrieval(data, per_memory=8)
    taken = [sum(len(passage.tokens) for passage in trial.own.values()) for trial in task.trials(6300)]
    assert memories(task, max(taken)), "just long enough for the gold alone"
    with pytest.raises(UserError, match=r"task 'retrieval_test': .*have up to [0-9,]+ tokens, and a memory") as raised:
        list(task.trials(max(taken) - 1))
    told = str(raised.value)
    assert f"{max(taken):,}" in told and f"{max(taken) - 1:,}" in told and "\n" not in told
    assert "lower per_memory, or begin with longer memories" in told


def test_mistakes_are_named(data: PackedMemory, tmp_path: Path) -> None:
    for wrong in ({"questions": 0}, {"per_memory": 0}, {"seed": -1}):
        with pytest.raises(UserError, match="RetrievalTask"):
            RetrievalTask(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no split 'dev'; the corpus has test, train"):
        retrieval(data, split="dev")
    folder = write_corpus(tmp_path / "mute", documents=10)
    lines = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    unanswered = "\n".join(json.dumps({"_id": line["_id"], "text": line["text"]}) for line in lines)
    (folder / "queries.jsonl").write_text(unanswered)
    with pytest.raises(UserError, match="AnswerTask: split 'test' has no question that it can ask"):
        opened(AnswerTask(corpus=str(folder)), data)
    with pytest.raises(UserError, match="neither a folder nor a file"):
        retrieval(data, distractors=(str(tmp_path / "nowhere"),))
