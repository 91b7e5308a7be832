"""A trial's memory is its documents, however it was put together; and only what is answered counts as an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules.tasks.corpus import AnswerTask
from datamodules.tasks.needles import NeedleTask
from msa_train.evaluation import methods
from msa_train.evaluation.evaluate import Evaluator, Record
from msa_train.evaluation.methods import Method, Routed, side_by_side, spoken
from msa_train.evaluation.task import Asked, Memory, Trial
from msa_train.generation import Answerer, AskConfig, Mode, Question
from msa_train.kernels.maxsim import Precision
from msa_train.memory import BankLayer, BanksLayer, Encoder, MemoryBank
from msa_train.model import MemorySparseModel
from msa_train.protocol import Protocol, Source
from tests.evaluation.by_hand import POOL, HandTask, document, pool, trial
from tests.memory.banks import HEADS, PRECISIONS, assert_same, assert_same_contents, contents, encoded_anew, queries
from tests.memory.conftest import TEXTS

# documents of the pool, and places of the texts that lie over them or behind them, by number
LAID = (
    (7, {1: 0, 7: 3}),  # the first and the last
    (24, {12: 5, 13: 6, 2: 7}),
    (9, {}),  # nothing
    (3, {4: 8, 6: 9}),  # behind the pool, with a gap
    (0, {2: 10, 5: 11}),  # no document of the pool at all
    (4, {1: 12, 2: 13, 3: 14, 4: 15}),  # none left
)


@pytest.fixture(scope="module")
def memories(protocol: Protocol) -> list[Memory]:
    return [Memory(pool(protocol), trial(protocol, documents, golds)) for documents, golds in LAID]


def prepared(
    model: MemorySparseModel, protocol: Protocol, memories: Sequence[Memory], precision: Precision = "float32",
    ask: AskConfig = AskConfig(),
) -> tuple[Routed, HandTask]:  # fmt: skip
    """A model that has encoded these memories' pool."""
    task = HandTask(memories[0].pool, {length: [memory.trial] for length, memory in enumerate(memories)})
    routed = Routed("router", model, protocol, ask, keys=precision)
    for length in range(len(memories)):
        routed.prepare(task, length)
    return routed, task


def laid(routed: Routed, memories: Sequence[Memory]) -> list[MemoryBank]:
    return routed._overlaid(routed.pools["animals"][0], memories)


# --- pool and overlay --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_memory_laid_over_the_pool_is_the_memory_encoded_alone(
    precision: Precision, model: MemorySparseModel, protocol: Protocol, encoder: Encoder, memories: list[Memory]
) -> None:
    routed, _ = prepared(model, protocol, memories, precision)
    before = contents(routed.pools["animals"][0])
    for memory, bank in zip(memories, laid(routed, memories), strict=True):
        numbered = [(number, memory.passage(number)) for number in memory.numbers]
        assert_same(bank, encoded_anew(encoder, numbered, precision))
    after = contents(routed.pools["animals"][0])
    assert after.keys() == before.keys() == set(range(1, POOL + 1)), "the pool is as it was"


class Naming(Answerer):
    """Names two documents that its logits point at, since an untrained model names none; then writes as any other."""

    def _turn(self, *given: Any) -> Any:
        self.named: dict[int, list[int]] = {}
        return super()._turn(*given)

    def _pick(self, following: Any, draw: torch.Generator) -> int:
        likeliest = super()._pick(following, draw)
        if self.config.mode == "router":
            return likeliest
        if id(draw) not in self.named:
            self.named[id(draw)] = self.protocol.retrieval([1 + likeliest % 7, 1 + likeliest // 7 % 11])
        return self.named[id(draw)].pop(0) if self.named[id(draw)] else likeliest


def asking(mode: Mode) -> AskConfig:
    return AskConfig(mode, documents=2, max_steps=1 if mode == "generative" else 2, max_new_tokens=6)


@pytest.mark.parametrize("mode", ["router", "generative"])
def test_it_finds_and_answers_as_the_memory_encoded_alone(
    mode: Mode, model: MemorySparseModel, protocol: Protocol, encoder: Encoder, memories: list[Memory],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(methods, "Answerer", Naming)
    routed, task = prepared(model, protocol, memories, ask=asking(mode))
    found, answered = routed.rank(task, memories, 30), routed.answer(task, memories)
    for memory, ranking, replies in zip(memories, found, answered, strict=True):
        numbers = memory.numbers
        bank = encoded_anew(encoder, [(number, memory.passage(number)) for number in numbers], "float32")
        answerer = Naming(model, protocol, bank, config=asking(mode))
        words = [asked.text for asked in memory.trial.asked]
        assert ranking == [[number for number, _ in row] for row in answerer.rank(words, 30)]
        assert all(sorted(row) == numbers for row in ranking), "all of the memory, and nothing else"
        for reply, answer in zip(replies, answerer.ask(words), strict=True):
            assert (reply.text, reply.notes) == (answer.text, answer.notes)
            assert reply.documents == tuple(one.number for one in answer.documents)
    replies = [reply for row in answered for reply in row]
    assert len({reply.text for reply in replies}) > 9 and len({reply.documents for reply in replies}) >= 3


def test_hidden_documents_of_the_pool_are_never_found_nor_read(
    model: MemorySparseModel, protocol: Protocol, memories: list[Memory]
) -> None:
    """The best ones are hidden, and nothing is put into their place: another rank holds what is."""
    routed, _ = prepared(model, protocol, memories)
    bank = routed.pools["animals"][0]
    query_LXR, offsets_Q = queries(bank)
    best_QK = bank.search(0, query_LXR[0], offsets_Q, HEADS, 4).number_QK
    hidden = set(best_QK.flatten().tolist())
    shown = sorted(set(range(1, POOL + 1)) - hidden)
    assert len(hidden) >= 4 and len(shown) > 10
    twice = bank.overlaid([], [min(hidden)]).overlaid([], hidden - {min(hidden)})
    for view in (bank.overlaid([], hidden), bank.overlaid([], [*hidden, 999]).upto(POOL), twice):
        rows = [view.search(layer, query_XR, offsets_Q, HEADS, POOL) for layer, query_XR in enumerate(query_LXR)]
        rows.append(view.rank(query_LXR, offsets_Q, [1.0, 2.0], HEADS, POOL))
        for found in rows:
            assert [sorted(row) for row in found.number_QK[:, : len(shown)].tolist()] == [shown] * 3
            assert bool((found.number_QK[:, len(shown) :] == -1).all())
        assert view.numbers() == shown and len(view.names()) == len(shown)
        assert not any(number in view or view.has(bank.id(number)) for number in hidden)
    assert bank.numbers() == list(range(1, POOL + 1)), "the bank that was laid over is as it was"


def test_encoding_apart_is_encoding_each_alone(encoder: Encoder, protocol: Protocol) -> None:
    groups = [
        [(number, document(protocol, place)) for number, place in group]
        for group in ([(5, 0), (9, 3)], [(1, 4)], [(2, 0), (5, 7), (400, 6)], [(1, 4)])
    ]
    for group, segment in zip(groups, encoder.apart(groups), strict=True):
        alone = MemoryBank(encoder.shape, [segment])
        assert alone.numbers() == [number for number, _ in group]
        assert_same_contents(alone, encoded_anew(encoder, group, "float32"))


@pytest.mark.parametrize("batch_tokens", [70, 200, 10_000])
def test_encoding_apart_in_batches_that_span_groups_mixes_nothing_up(
    batch_tokens: int, model: MemorySparseModel, protocol: Protocol, encoder: Encoder
) -> None:
    groups = [[(7 - n, document(protocol, 3 * n)), (20 + n, document(protocol, 3 * n + 1))] for n in range(6)]
    segments = Encoder(model, protocol, "float32", batch_tokens).apart(groups)
    seen = 0
    for group, segment in zip(groups, segments, strict=True):
        mine = contents(MemoryBank(encoder.shape, [segment]))
        theirs = contents(encoded_anew(encoder, group, "float32"))
        for (number, passage), held in zip(group, mine.values(), strict=True):
            wanted = theirs[number]
            assert (held.id, held.text, held.tokens) == (passage.id, passage.text, wanted.tokens)
            for one, other in zip(held.tensors, wanted.tensors, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
                seen += one.numel()
    assert seen > 1000


# --- a batch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["router", "generative"])
def test_a_batch_over_several_memories_is_each_question_alone(
    mode: Mode, model: MemorySparseModel, protocol: Protocol, memories: list[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "Answerer", Naming)
    routed, task = prepared(model, protocol, memories, ask=asking(mode))
    routed.together = 11
    twice = [*memories, *memories]  # 26 questions, more than are read at a time
    together, ranked = routed.answer(task, twice), routed.rank(task, twice, 7)
    assert sum(map(len, together)) == 26 and together[: len(memories)] == together[len(memories) :]
    for memory, replies, rows in zip(memories, together, ranked, strict=False):
        for asked, reply, row in zip(memory.trial.asked, replies, rows, strict=True):
            alone = replace(memory, trial=replace(memory.trial, asked=(asked,)))
            assert routed.answer(task, [alone]) == [[reply]]
            assert routed.rank(task, [alone], 7) == [[row]]


@pytest.mark.parametrize(
    ("layers", "groups", "width", "dtype", "wanted"),
    [
        (36, 8, 128, torch.bfloat16, 16),  # Qwen3-4B
        (64, 8, 128, torch.bfloat16, 16),  # a larger one
        (28, 8, 128, torch.bfloat16, 20),  # Qwen3-0.6B
        (30, 3, 64, torch.bfloat16, 64),  # SmolLM2-135M
        (30, 3, 64, torch.float32, 51),
    ],
)
def test_questions_side_by_side_are_those_whose_contexts_fit_where_16_of_a_large_model_do(
    layers: int, groups: int, width: int, dtype: torch.dtype, wanted: int
) -> None:
    weight = torch.empty(0, dtype=dtype)
    attention = [SimpleNamespace(groups=groups, width=width)] * layers
    model: Any = SimpleNamespace(attention=attention, parameters=lambda: iter([weight]))
    assert side_by_side(model) == wanted
    taken, allowed = layers * groups * width * 2 * weight.element_size() * wanted, 16 * 147_456
    assert wanted == 16 or taken <= allowed


def test_a_method_gets_as_many_questions_at_a_time_as_it_likes(
    model: MemorySparseModel, protocol: Protocol, memories: list[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both from the evaluation and within itself; one that likes nothing in particular gets 16."""
    given: list[int] = []
    batches: list[int] = []

    class Told(Answerer):
        def ask(self, questions: Sequence[str | Question], batch: int = 0) -> list[Any]:
            given.append(len(questions))
            batches.append(batch)
            return super().ask(questions, batch)

    monkeypatch.setattr(methods, "Answerer", Told)
    trials = [trial(protocol, 9, {1 + place % 5: place}) for place in range(20)]
    task = HandTask(pool(protocol), {10: trials})

    def method(together: int | None) -> Routed:
        routed = Routed("router", model, protocol, asking("router"))
        assert routed.together == 64 and Method.together == 16
        routed.together = together or routed.together
        return routed

    for together, wanted in ((None, [20]), (16, [16, 4]), (7, [7, 7, 6])):
        given.clear()
        (row,), _ = Evaluator([task], [10], 3, 1e6).run({"": lambda together=together: method(together)})
        assert given == wanted and row.scores["right"].n == 20 and batches[-1] == (together or 64)


def test_queries_with_banks_of_their_own_choose_as_alone(
    model: MemorySparseModel, protocol: Protocol, memories: list[Memory]
) -> None:
    """Neighbours with one bank are searched together; what one query must not get, another may."""
    routed, _ = prepared(model, protocol, memories)
    small, large, none = laid(routed, [memories[4], memories[1], memories[0]])  # of 2, 24 and 7 documents
    none = none.only([])
    banks = [small, large, large, none, large, small]
    excluded = [[], [12], [3, 4, 5, 6, 7], [1], [12, 13], [2]]
    query_LXR, offsets_Q = queries(large, lengths=(3, 1, 4, 2, 1, 5))
    for layer, query_XR in enumerate(query_LXR):
        whole = BanksLayer(banks, layer, excluded).choose(query_XR, offsets_Q, HEADS, 3)
        assert torch.equal(whole.found.query_XR, query_XR) and whole.selected_QK.shape == (6, 3)
        counts = [2, 3, 3, 0, 3, 1]
        for place, (bank, mine, number) in enumerate(zip(banks, excluded, counts, strict=True)):
            first, last = offsets_Q[place : place + 2].tolist()
            own = BankLayer(bank, layer, [mine]).choose(query_XR[first:last], torch.tensor([0, last - first]), HEADS, 3)
            found = whole.found.found
            assert torch.equal(found.number_QK[place], own.found.found.number_QK[0])
            torch.testing.assert_close(found.score_QK[place], own.found.found.score_QK[0], atol=1e-6, rtol=1e-6)
            selected = whole.selected_QK[place][whole.selected_QK[place] >= 0].tolist()
            assert len(selected) == number == int((found.number_QK[place] >= 0).sum())
            for there, here in zip(selected, own.selected_QK[0].tolist(), strict=False):
                for mine_CGW, theirs_CGW in ((whole.key_CGW, own.key_CGW), (whole.value_CGW, own.value_CGW)):
                    mine_rows = mine_CGW[slice(*whole.chunks.offsets_D[there : there + 2].tolist())]
                    theirs_rows = theirs_CGW[slice(*own.chunks.offsets_D[here : here + 2].tolist())]
                    assert torch.equal(mine_rows, theirs_rows) and len(mine_rows)


# --- only the answer counts --------------------------------------------------------------------------------------


class Scripted(Answerer):
    """Writes what it is told, to every question alike, and keeps what it was asked and given."""

    script: tuple[int, ...] = ()
    asked: list[Question] = []  # noqa: RUF012
    fed: list[int] = []  # noqa: RUF012

    def ask(self, questions: Sequence[str | Question], batch: int = 1) -> list[Any]:
        Scripted.asked = [question for question in questions if isinstance(question, Question)]
        return super().ask(questions, batch=1)

    def _turn(self, *given: Any) -> Any:
        self.left, Scripted.fed = iter(self.script), []
        return super()._turn(*given)

    def _pick(self, following: Any, draw: torch.Generator) -> int:
        return next(self.left)

    def _serve(self, waiting: dict[int, Any]) -> dict[int, Any]:
        Scripted.fed = [*Scripted.fed, *(token for one in waiting.values() for token in getattr(one, "tokens", ()))]
        return super()._serve(waiting)


GOLD, OTHER = 4, 7  # numbers of the gold document, and of one of the pool
TOLD = f"river {GOLD - 1}"


@pytest.fixture(params=["squad", "ruler"])
def scored(
    request: pytest.FixtureRequest, model: MemorySparseModel, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Evaluates a scripted model as AnswerTask and NeedleTask score it: what it writes -> headline score and record."""
    monkeypatch.setattr(methods, "Answerer", Scripted)
    judge = AnswerTask() if request.param == "squad" else NeedleTask("niah_single_1")

    class Task(HandTask):
        def score(self, asked: Asked, answer: str) -> dict[str, float]:
            return judge.score(asked, answer)

    def evaluate(
        *written: Sequence[int], mode: Mode = "generative", asked: Asked | None = None
    ) -> tuple[float, Record]:
        one = trial(protocol, 11, {GOLD: GOLD - 1})
        task = Task(pool(protocol), {10: [one if asked is None else replace(one, asked=(asked,))]})
        task.metric = judge.metric
        config = AskConfig(mode, documents=9, max_steps=1, max_new_tokens=20)
        monkeypatch.setattr(Scripted, "script", tuple(token for part in written for token in part))
        evaluator = Evaluator([task], [10], 3, 1e6)
        (row,), (record,) = evaluator.run({"": lambda: Routed("router", model, protocol, config)})
        assert row.scores[judge.metric].value == record.scores[judge.metric]
        return record.scores[judge.metric], record

    return evaluate


def test_a_document_recited_as_a_retrieval_step_is_no_answer(scored: Any, protocol: Protocol) -> None:
    recited = protocol.text(f" {TEXTS[GOLD - 1]}")
    assert TOLD in TEXTS[GOLD - 1] and 5 < len(recited) < 128
    score, record = scored(recited, [protocol.ref], [protocol.end])
    assert score == 0.0 and record.scores["empty"] == 1.0 and record.answer == ""
    assert record.notes == ("named no document",) and record.scores["gold_recall"] == 0.0
    numbered = protocol.retrieval([GOLD])[:-1]
    score, record = scored(numbered, recited, [protocol.ref], [protocol.end])
    assert score == 0.0 and record.scores["empty"] == 1.0 and record.scores["gold_recall"] == 1.0


@pytest.mark.parametrize("mode", ["router", "generative"])
def test_the_text_of_a_document_that_was_brought_is_no_answer(mode: Mode, scored: Any, protocol: Protocol) -> None:
    named = () if mode == "router" else protocol.retrieval([GOLD, OTHER])
    score, record = scored(named, [protocol.end], mode=mode)
    assert record.scores["gold_recall"] == 1.0 and "a3" in record.documents
    injected = protocol.injection([Source(GOLD, protocol.text(f" {TEXTS[GOLD - 1]}"))])
    assert str(injected)[1:-1] in str(Scripted.fed), "its words are in the context"
    assert score == 0.0 and record.scores["empty"] == 1.0 and record.answer == ""


def test_an_oracle_is_right_whether_it_looked_or_not(scored: Any, protocol: Protocol) -> None:
    answer = [*protocol.text(f" {TOLD}"), protocol.end]
    score, record = scored(protocol.retrieval([GOLD]), answer)
    assert score == 1.0 and record.answer == TOLD
    assert record.scores["gold_recall"] == 1.0 and record.scores["empty"] == 0.0
    score, record = scored(protocol.retrieval([OTHER]), answer)
    assert score == 1.0 and record.scores["gold_recall"] == 0.0, "right, but not because the document was found"


def test_a_wrong_answer_over_the_right_document_is_wrong(scored: Any, protocol: Protocol) -> None:
    score, record = scored(protocol.retrieval([GOLD]), [*protocol.text(" nobody knows"), protocol.end])
    assert score == 0.0 and record.scores["gold_recall"] == 1.0 and record.scores["empty"] == 0.0


@pytest.mark.parametrize("mode", ["router", "generative"])
def test_the_words_that_an_answer_begins_with_are_given_and_are_no_part_of_it(
    mode: Mode, scored: Any, protocol: Protocol
) -> None:
    asked = Asked("q", "Where does the amber fox live?", (GOLD,), (TOLD,), lead=f"It lives by {TOLD}, for")
    named = () if mode == "router" else protocol.retrieval([OTHER])
    score, record = scored(named, [protocol.end], mode=mode, asked=asked)
    assert score == 0.0 and record.answer == "" and record.scores["empty"] == 1.0
    begun = [*protocol.lead, *protocol.text(f" {asked.lead}")]
    assert Scripted.fed[-len(begun) :] == begun, "it is the last that the reader reads"
    score, record = scored(named, [*protocol.text(f" {TOLD}"), protocol.end], mode=mode, asked=asked)
    assert score == 1.0 and record.answer == TOLD


def test_a_reader_that_saw_no_memory_hears_the_preamble_before_the_question(scored: Any, protocol: Protocol) -> None:
    asked = Asked("q", "Which river?", (GOLD,), (TOLD,), preamble="A river is hidden somewhere.")
    _, record = scored(protocol.retrieval([GOLD]), [protocol.end], asked=asked)
    assert [question.text for question in Scripted.asked] == ["A river is hidden somewhere.\nWhich river?"]
    assert record.question == "Which river?" and spoken(replace(asked, preamble="")) == "Which river?"


def test_a_trial_of_the_pool_alone_needs_no_encoding(
    model: MemorySparseModel, protocol: Protocol, memories: list[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    routed, _ = prepared(model, protocol, memories)
    plain = [Memory(pool(protocol), Trial(documents, {}, (), 1)) for documents in (24, 1, 0)]
    monkeypatch.setattr(routed.encoder, "_encode", None)
    assert [len(bank) for bank in laid(routed, plain)] == [24, 1, 0]
