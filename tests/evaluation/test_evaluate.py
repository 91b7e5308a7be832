"""The evaluator: one pool for all lengths, a budget that leaves the longest out, and records of all that was scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from msa_train.errors import UserError
from msa_train.evaluation.evaluate import DEPTHS, Evaluator, Record, Row
from msa_train.evaluation.methods import TOGETHER, Beyond, Method, Reply, Routed
from msa_train.evaluation.scores import Mean
from msa_train.evaluation.task import Asked, Memory, Task, headlines
from msa_train.generation import AskConfig
from msa_train.memory import encoding
from msa_train.model import MemorySparseModel
from msa_train.protocol import Protocol
from tests.evaluation.by_hand import Clock, HandTask, ToldMethod, by_id, notes, pool, trial, untimed
from tests.memory.banks import assert_same

LENGTHS = (10, 20, 40)


def rivers(protocol: Protocol, answers: bool = True, **given: Any) -> HandTask:
    """Memories of 5, 11 and 24 documents, some with two questions."""
    listed = {
        10: [trial(protocol, 5, {2: 0, 5: 9}), trial(protocol, 5, {1: 12})],
        20: [trial(protocol, 11, {9: 0, 3: 9}), trial(protocol, 11, {11: 12})],
        40: [trial(protocol, 24, {20: 0, 25: 9}), trial(protocol, 24, {7: 12})],
    }
    return HandTask(pool(protocol), listed, "rivers" if answers else "finding", answers, **given)


def run(
    tasks: Sequence[Task], lengths: Sequence[int], *methods: Callable[[], Method], budget_s: float = 1e6, **given: Any
) -> tuple[list[Row], list[Record]]:
    given = {"clock": Clock(), **given}
    return Evaluator(tasks, lengths, 3, budget_s, **given).run({str(n): make for n, make in enumerate(methods)})


# --- the memory --------------------------------------------------------------------------------------------------


def test_one_pool_for_all_lengths_scores_as_each_length_alone(model: MemorySparseModel, protocol: Protocol) -> None:
    tasks = [rivers(protocol), rivers(protocol, answers=False)]

    def routed() -> Routed:
        return Routed("router", model, protocol, AskConfig(documents=2, max_steps=2, max_new_tokens=6))

    rows, records = run(tasks, LENGTHS, routed)
    apart = [run([task], [length], routed) for length in LENGTHS for task in tasks]
    assert list(map(untimed, rows)) == [untimed(row) for found, _ in apart for row in found]
    assert records == [record for _, found in apart for record in found]
    assert [(row.task, row.length, row.documents) for row in rows] == [
        (name, length, documents)
        for length, documents in ((10, 5.0), (20, 11.0), (40, 24.5))
        for name in ("rivers", "finding")
    ]
    assert all(mean.n == 3 for row in rows for mean in row.scores.values())
    assert len({record.documents for record in records}) > 6, "memories differ, and so does what is found in them"


@pytest.mark.parametrize("segment_bytes", [6000, 1 << 30])
def test_a_pool_that_grew_is_the_pool_encoded_at_once(
    segment_bytes: int, model: MemorySparseModel, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "SEGMENT_BYTES", segment_bytes)
    task = rivers(protocol)
    grown, whole = (Routed("router", model, protocol, keys="float32") for _ in range(2))
    for length in (10, 20, 10, 40, 20):
        grown.prepare(task, length)
    whole.prepare(task, 40)
    (mine, known), (theirs, _) = grown.pools["animals"], whole.pools["animals"]
    assert known == 24 == len(mine)
    assert_same(mine, theirs)


# --- scores and records ------------------------------------------------------------------------------------------


def test_a_record_tells_what_was_asked_found_answered_and_scored(protocol: Protocol) -> None:
    replies = {"q0": Reply("by River 0, I think", (9, 2), ("a note",)), "q9": Reply("river 7", (4,)),
               "q12": Reply(" ", ())}  # fmt: skip
    (row,), records = run([rivers(protocol)], [20], lambda: ToldMethod(lambda memory, asked: replies[asked.id]))
    found = by_id(records)
    assert found["q0"] == Record(
        method="told", task="rivers", length=20, id="q0", question="Where does the red fox live?",
        wanted=("river 0",), gold=("a0",), answer="by River 0, I think", documents=("a0", "a31"), depth=0.0,
        scores={"right": 1.0, "letters": 0.19, "empty": 0.0, "gold_recall": 1.0}, notes=("a note",),
    )  # fmt: skip
    assert found["q9"].scores == {"right": 0.0, "letters": 0.07, "empty": 0.0, "gold_recall": 0.0}
    assert found["q9"].documents == ("a33",), "number 3 is the trial's own, and 4 the pool's"
    assert found["q12"].scores == {"right": 0.0, "letters": 0.01, "empty": 1.0, "gold_recall": 0.0}
    means = {name: mean.value for name, mean in row.scores.items()}
    assert means == pytest.approx({"right": 1 / 3, "letters": 0.09, "empty": 1 / 3, "gold_recall": 1 / 3})
    assert row.scores["right"] == Mean.of([1.0, 0.0, 0.0])
    assert (row.tokens, row.documents, row.note) == (1100.0, 11.0, "")


def test_a_ranking_is_scored_per_question(protocol: Protocol) -> None:
    ranked = {"q0": [9, 3, 1], "q9": [1, 3, 9], "q12": [1, 2, 3, 4, 5, 6, 7, 8, 9, 11]}
    task = rivers(protocol, answers=False)
    (row,), records = run([task], [20], lambda: ToldMethod(lambda memory, asked: ranked[asked.id]))
    found = by_id(records)
    assert found["q0"].scores == {"recall@1": 1.0, "recall@k": 1.0, "mrr@10": 1.0, "ndcg@10": 1.0}
    assert found["q9"].scores["mrr@10"] == 0.5 and found["q9"].scores["recall@k"] == 1.0
    assert found["q12"].scores["mrr@10"] == 0.1 and found["q12"].scores["recall@k"] == 0.0, "k is 3, MRR looks at 10"
    assert (found["q12"].answer, found["q12"].notes, len(found["q12"].documents)) == (None, (), 10)
    assert row.scores["recall@1"].value == pytest.approx(1 / 3) and set(row.scores) == set(found["q0"].scores)


def test_gold_recall_stands_beside_accuracy_but_not_where_everything_is_read(protocol: Protocol) -> None:
    def reading(memory: Memory, asked: Asked) -> Reply:
        return Reply(asked.answers[0], None)

    def retrieving(memory: Memory, asked: Asked) -> Reply:
        return Reply(asked.answers[0], asked.gold if asked.id == "q0" else ())

    rows, records = run([rivers(protocol)], [10], lambda: ToldMethod(reading), lambda: ToldMethod(retrieving))
    full, some = rows
    assert full.scores["right"].value == some.scores["right"].value == 1.0
    assert "gold_recall" not in full.scores and some.scores["gold_recall"] == Mean.of([1.0, 0.0, 0.0])
    assert [record.documents for record in records] == [(), (), (), ("a0",), (), ()]


def test_depths_are_the_headline_score_in_tenths_of_the_memory(protocol: Protocol) -> None:
    places = [0.0, 0.09, 0.1, 0.55, 0.99, 1.0]
    listed = {10: [trial(protocol, 9, {place + 1: place for place in range(6)}, places)]}
    right = {"q0", "q2", "q4", "q5"}

    def reply(memory: Memory, asked: Asked) -> Reply:
        return Reply(asked.answers[0] if asked.id in right else "no", None)

    (row,), records = run([HandTask(pool(protocol), listed)], [10], lambda: ToldMethod(reply))
    assert len(row.depths) == DEPTHS and sum(n for _, n in row.depths) == 6 == len(records)
    assert {band: cell for band, cell in enumerate(row.depths) if cell[1]} == {
        0: (0.5, 2), 1: (1.0, 1), 5: (0.0, 1), 9: (1.0, 2),
    }  # fmt: skip
    assert [record.depth for record in records] == places


class StubJudge:
    """Grades from a list, and keeps what it was given."""

    def __init__(self, *grades: int | None) -> None:
        self.grades, self.given = iter(grades), list[Any]()

    def grade(self, items: Sequence[tuple[str, Sequence[str], str]]) -> list[int | None]:
        self.given.extend(items)
        return [next(self.grades) for _ in items]


def test_the_judge_grades_answers_and_an_answer_without_a_grade_is_in_no_mean(protocol: Protocol) -> None:
    judge = StubJudge(5, None, 2)
    (row,), records = run(
        [rivers(protocol)], [10], lambda: ToldMethod(lambda memory, asked: Reply(f"<{asked.id}>", (1,))), judge=judge
    )
    assert judge.given == [
        ("Where does the red fox live?", ("river 0",), "<q0>"),
        ("Where does the green heron live?", ("river 9",), "<q9>"),
        ("Where does the violet heron live?", ("river 12",), "<q12>"),
    ]
    assert row.scores["judge"] == Mean.of([5.0, 2.0]) and row.scores["right"].n == 3
    assert [record.scores.get("judge") for record in records] == [5.0, None, 2.0]


def test_what_is_not_judged_costs_no_grade(protocol: Protocol) -> None:
    exact = rivers(protocol)
    exact.judged = False
    tasks = [exact, rivers(protocol, answers=False)]
    for task, reply in zip(tasks, (Reply("river 0", None), [1]), strict=True):
        (row,), _ = run([task], [10], lambda reply=reply: ToldMethod(lambda *_: reply), judge=StubJudge())
        assert row.scores and "judge" not in row.scores and row.note == ""
    rows, _ = run([rivers(protocol, reach=1)], [10], lambda: ToldMethod(right), judge=StubJudge())
    assert rows[0].scores == {}, "nor does what was left out"


def test_a_judge_that_cannot_be_reached_costs_its_grades_alone(protocol: Protocol) -> None:
    class Away:
        def grade(self, items: Any) -> list[int | None]:
            raise UserError("judge: no quota")

    clock = Clock()
    rows, records = run([rivers(protocol)], LENGTHS, by_length(clock), judge=Away(), clock=clock, budget_s=69.0)
    ungraded = "not graded: judge: no quota"
    assert notes(rows) == {("told", 10): ungraded, ("told", 20): ungraded,
                           ("told", 40): "left out: takes about 40 s, 39 s are left"}  # fmt: skip
    assert all(set(row.scores) == {"right", "letters", "empty"} for row in rows[:2]) and len(records) == 6


# --- means over tasks --------------------------------------------------------------------------------------------


def test_a_mean_over_tasks_is_resampled_within_each_of_them() -> None:
    """Against every resample there is, counted one by one: 2^2 * 3^3 * 4^4 of them."""
    tasks = [[1.0, 0.75], [0.0, 0.25, 0.125], [0.5, 0.25, 0.625, 0.5]]
    every = [
        fmean(fmean(drawn) for drawn in resample)
        for resample in product(*(product(task, repeat=len(task)) for task in tasks))
    ]
    assert len(every) == 27_648
    mean = Mean.over(tasks, draws=20_000)
    assert mean.value == pytest.approx((7 / 8 + 1 / 8 + 15 / 32) / 3) and mean.n == 9
    assert (mean.low, mean.high) == pytest.approx(np.quantile(every, [0.025, 0.975]), abs=0.01)
    pooled = Mean.of(sum(tasks, []))
    assert mean.value - pooled.value > 0.02, "every task counts as much, however few its questions"
    assert mean.high - mean.low < (pooled.high - pooled.low) / 2, "that tasks differ is no doubt about their mean"
    assert Mean.over(tasks) == Mean.over(tasks), "the same draws every time"


def test_equal_scores_have_no_interval_however_many_tasks() -> None:
    mean = Mean.over([[0.1] * 3, *([[0.7] * 5] * 7), [0.3]])
    assert mean.low == mean.value == mean.high and mean.n == 39


def in_group(task: HandTask, name: str, group: str = "rivers") -> HandTask:
    task.name, task.group = name, group
    return task


def test_tasks_of_a_group_have_their_mean_behind_them(protocol: Protocol) -> None:
    """Two questions of three are right in one, one of two in the other."""
    deep = {length: [trial(protocol, 8, {4: 15, 6: 18})] for length in (10, 20)}
    tasks = [
        in_group(rivers(protocol), "wide"), in_group(rivers(protocol), "other", "lonely"),
        in_group(HandTask(pool(protocol), deep), "deep"), rivers(protocol, answers=False),
    ]  # fmt: skip
    clock, told = Clock(), list[Row]()

    class Told(ToldMethod):
        def rank(self, task: Task, memories: Sequence[Memory], k: int) -> list[list[list[int]]]:
            return [[[1] for _ in memory.trial.asked] for memory in memories]

    def reply(memory: Memory, asked: Asked) -> Reply:
        return Reply("" if asked.id in ("q9", "q15") else asked.answers[0], asked.gold)

    rows, records = run(tasks, (10, 20), lambda: Told(reply, clock=clock, seconds=float), clock=clock, tell=told.append)
    names = ["wide", "other", "deep", "finding", "rivers_mean_of_2"]
    assert [(row.task, row.length) for row in rows] == [(name, length) for length in (10, 20) for name in names]
    assert told == rows and len(records) == 2 * (3 + 3 + 2 + 3), "a mean has no questions of its own"
    mean = rows[4]
    assert mean.scores["right"] == Mean.over([[1.0, 0.0, 1.0], [0.0, 1.0]]) and mean.scores["right"].n == 5
    assert mean.scores["right"].value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert mean.scores["empty"] == Mean.over([[0.0, 1.0, 0.0], [1.0, 0.0]])
    assert set(mean.scores) == {"right", "letters", "empty", "gold_recall"}
    assert (mean.method, mean.tokens, mean.documents, mean.seconds) == ("told", 650.0, 6.5, 20.0)
    assert mean.depths == () and mean.note == ""
    assert list(headlines(tasks).items()) == [
        ("rivers_mean_of_2", "right"), ("wide", "right"), ("other", "right"), ("deep", "right"),
        ("finding", "recall@1"),
    ]  # fmt: skip


def test_a_mean_has_the_scores_that_all_its_tasks_have(protocol: Protocol) -> None:
    tasks = [in_group(rivers(protocol), "judged"), in_group(rivers(protocol), "exact")]
    tasks[1].judged = False
    judged, _, mean = run(tasks, [10], lambda: ToldMethod(right), judge=StubJudge(5, None, 2))[0]
    assert set(judged.scores) - set(mean.scores) == {"judge"} and len(mean.scores) == 3


def test_a_mean_says_which_of_its_tasks_ended_early_and_which_it_lacks(protocol: Protocol) -> None:
    """Of length 20, foreseen with 4 s each, the first task takes 16 s and the second is late after 8; the third has no
    documents for it in another run."""
    clock = Clock()
    tasks = [in_group(many(protocol, 2 * TOGETHER), name) for name in ("first", "second")]
    per_batch = {10: 1.0, 20: 8.0, 40: 1.0}
    rows, _ = run(
        tasks, LENGTHS, lambda: ToldMethod(right, clock=clock, seconds=per_batch.__getitem__), clock=clock,
        budget_s=27.0,
    )  # fmt: skip
    means = [row for row in rows if row.task == "rivers_mean_of_2"]
    assert [row.note for row in means] == [
        "", "ended early: no time for more questions (second)", "no mean without first, second",
    ]  # fmt: skip
    assert [row.scores["right"].n if row.scores else 0 for row in means] == [4 * TOGETHER, 3 * TOGETHER, 0]

    tasks = [in_group(rivers(protocol), "first"), in_group(rivers(protocol, reach=19), "third")]
    *_, third, mean = run(tasks, (10, 20), lambda: ToldMethod(right))[0]
    assert (third.task, mean.note, mean.scores) == ("third", "no mean without third", {})


def test_tasks_of_different_scores_have_no_mean(protocol: Protocol) -> None:
    tasks = [in_group(rivers(protocol), "answers"), in_group(rivers(protocol, answers=False), "finding")]
    with pytest.raises(UserError, match=r"group 'rivers': answers by right, finding by recall@1: only tasks of one"):
        run(tasks, [10])


# --- the budget --------------------------------------------------------------------------------------------------


def right(memory: Memory, asked: Asked) -> Reply:
    return Reply(asked.answers[0], None)


def by_length(clock: Clock, name: str = "told", **given: Any) -> Callable[[], Method]:
    """Takes a second for every token of a length."""
    return lambda: ToldMethod(right, name, clock, lambda length: float(length), **given)


def test_nothing_is_left_out_where_there_is_time(protocol: Protocol) -> None:
    clock = Clock(1000.0)
    rows, records = run([rivers(protocol)], LENGTHS, by_length(clock), clock=clock, budget_s=70.0)
    assert notes(rows) == {} and [row.scores["right"].n for row in rows] == [3, 3, 3] and len(records) == 9
    assert [row.seconds for row in rows] == [10.0, 20.0, 40.0] and clock.now == 1070.0


def test_what_would_take_too_long_is_left_out_the_longest_first(protocol: Protocol) -> None:
    clock = Clock()
    rows, records = run([rivers(protocol)], LENGTHS, by_length(clock), clock=clock, budget_s=69.0)
    assert notes(rows) == {("told", 40): "left out: takes about 40 s, 39 s are left"}
    assert [(row.length, len(row.scores)) for row in rows] == [(10, 3), (20, 3), (40, 0)] and clock.now == 30.0
    assert {record.length for record in records} == {10, 20}


def test_growth_is_what_the_method_says_until_it_was_seen(protocol: Protocol) -> None:
    """It says that its time grows with the square, and it grows with the length: 40 s, then 20 s are foreseen for 20
    tokens, and 40 s for 40."""
    clock = Clock()
    make = by_length(clock, growth=2.0)
    rows, _ = run([rivers(protocol)], LENGTHS, make, clock=clock, budget_s=49.0)
    assert notes(rows)["told", 20] == "left out: takes about 40 s, 39 s are left"
    clock = Clock()
    rows, _ = run([rivers(protocol)], LENGTHS, by_length(clock, growth=2.0), clock=clock, budget_s=69.0)
    assert notes(rows) == {("told", 40): "left out: takes about 40 s, 39 s are left"}


def test_preparing_is_foreseen_by_the_tokens_that_are_new(protocol: Protocol) -> None:
    """Two tasks with one pool: the first prepares it, 3 s a token; asking takes no time."""
    clock = Clock()

    class Preparing(ToldMethod):
        reached = 0

        def prepare(self, task: Task, length: int) -> None:
            clock.now += 3.0 * max(length - self.reached, 0)
            self.length = self.reached = length

    first, second = rivers(protocol), rivers(protocol)
    second.name = "second"
    rows, _ = run([first, second], LENGTHS, lambda: Preparing(right), clock=clock, budget_s=110.0)
    late = "left out: takes about 60 s, 50 s are left"
    assert [row.note for row in rows] == ["", "", "", "", late, late] and clock.now == 60.0


def test_the_first_has_half_and_the_others_share_the_rest(protocol: Protocol) -> None:
    """Of 60 s the first has 30 and takes them; the second has half of 30, of which it takes 10; the third has 20."""
    clock = Clock()
    makers = [by_length(clock, name) for name in ("first", "second", "third")]
    rows, _ = run([rivers(protocol)], (10, 20), *makers, clock=clock, budget_s=60.0)
    assert notes(rows) == {
        ("second", 20): "left out: takes about 20 s, 5 s are left",
        ("third", 20): "left out: takes about 20 s, 10 s are left",
    }
    clock = Clock()
    rows, _ = run([rivers(protocol)], (10, 20), by_length(clock), clock=clock, budget_s=30.0)
    assert notes(rows) == {}, "where it is alone it has all"


def test_a_method_s_making_is_part_of_its_time(protocol: Protocol) -> None:
    clock = Clock()

    def make() -> Method:
        clock.now += 25.0  # weights are read
        return by_length(clock)()

    rows, _ = run([rivers(protocol)], (10, 20), make, clock=clock, budget_s=50.0)
    assert notes(rows) == {("told", 20): "left out: takes about 20 s, 15 s are left"} and clock.now == 35.0


def test_each_task_is_foreseen_from_itself(protocol: Protocol) -> None:
    clock = Clock()
    slow, quick = rivers(protocol), rivers(protocol)
    quick.name = "quick"
    seconds = {"rivers": 12.0, "quick": 1.0}

    class Uneven(ToldMethod):
        def answer(self, task: Task, memories: Sequence[Memory]) -> list[list[Reply]]:
            clock.now += seconds[task.name] * self.length / 10
            return super().answer(task, memories)

    rows, _ = run([slow, quick], (10, 20), lambda: Uneven(right), clock=clock, budget_s=30.0)
    assert [(row.task, row.length) for row in rows if row.note] == [("rivers", 20)]
    assert [row.seconds for row in rows] == [12.0, 1.0, 0.0, 2.0]


def many(protocol: Protocol, questions: int) -> HandTask:
    """So many memories of one question."""
    trials = [trial(protocol, 6, {1 + place % 6: place}) for place in range(questions)]
    return HandTask(pool(protocol), {10: trials, 20: trials, 40: trials})


def test_a_cell_that_runs_late_ends_early_with_the_questions_it_had(protocol: Protocol) -> None:
    clock = Clock()
    task = many(protocol, 3 * TOGETHER - 5)
    per_batch = {10: 1.0, 20: 8.0, 40: 1.0}
    rows, records = run(
        [task], LENGTHS, lambda: ToldMethod(right, clock=clock, seconds=per_batch.__getitem__), clock=clock,
        budget_s=14.0,
    )  # fmt: skip
    # 3 s for the first length; of the second, foreseen with 6 s, two batches until 19 s
    assert notes(rows) == {("told", 20): "ended early: no time for more questions",
                           ("told", 40): "left out: no time is left"}  # fmt: skip
    assert [row.scores["right"].n if row.scores else 0 for row in rows] == [43, 32, 0]
    assert [record.id for record in records if record.length == 20] == [f"q{place}" for place in range(32)]
    assert rows[1].seconds == 16.0 and sum(n for _, n in rows[1].depths) == 32


def test_a_cell_that_was_begun_has_its_first_questions_however_late_it_is(protocol: Protocol) -> None:
    clock = Clock()

    class Slow(ToldMethod):
        def prepare(self, task: Task, length: int) -> None:
            super().prepare(task, length)
            clock.now += 99.0

    rows, _ = run([many(protocol, 20)], [10], lambda: Slow(right), clock=clock, budget_s=1.0)
    assert rows[0].scores["right"].n == TOGETHER and "ended early" in rows[0].note and rows[0].seconds == 99.0


def test_who_is_told_to_stop_ends_with_what_there_is(protocol: Protocol) -> None:
    clock = Clock()
    per_batch = {10: 1.0, 20: 8.0, 40: 1.0}
    others: list[str] = []

    def other() -> Method:
        others.append("made")
        return ToldMethod(right, "other")

    rows, _ = run(
        [many(protocol, 3 * TOGETHER - 5)], LENGTHS,
        lambda: ToldMethod(right, clock=clock, seconds=per_batch.__getitem__), other, clock=clock,
        stop=lambda: 12.0 < clock.now < 20.0,
    )  # fmt: skip
    told = "told to stop"
    assert notes(rows) == {
        ("told", 20): f"ended early: {told}", ("told", 40): f"left out: {told}"
    }  # fmt: skip
    assert [row.scores["right"].n if row.scores else 0 for row in rows] == [43, 32, 0] and others == []


def test_who_is_told_to_stop_while_it_gets_ready_asks_nothing(protocol: Protocol) -> None:
    ready: list[int] = []

    class Preparing(ToldMethod):
        def prepare(self, task: Task, length: int) -> None:
            ready.append(length)

    rows, records = run([rivers(protocol)], LENGTHS, lambda: Preparing(right), stop=lambda: bool(ready))
    assert {row.note for row in rows} == {"left out: told to stop"} and ready == [10] and not records


# --- what does not go -------------------------------------------------------------------------------------------


def test_a_memory_that_a_method_cannot_take_becomes_a_note(protocol: Protocol) -> None:
    def reply(memory: Memory, asked: Asked) -> Reply:
        if len(memory.numbers) > 20:
            raise Beyond("24 documents are too many")
        return Reply("river 0", None)

    rows, records = run([rivers(protocol)], LENGTHS, lambda: ToldMethod(reply), lambda: ToldMethod(right, "next"))
    assert notes(rows) == {("told", 40): "24 documents are too many"}
    assert [(row.method, row.length) for row in rows if row.scores] == [
        ("told", 10), ("told", 20), ("next", 10), ("next", 20), ("next", 40),
    ]  # fmt: skip
    assert len(records) == 15


def test_memories_longer_than_there_are_documents_are_left_out_with_a_note(protocol: Protocol) -> None:
    rows, _ = run([rivers(protocol, reach=20_39)], (10, 20, 4096), lambda: ToldMethod(right))
    assert notes(rows) == {("told", 4096): "there are documents for 2,039 tokens"} and len(rows) == 3


def test_what_fails_is_raised_and_the_method_let_go(protocol: Protocol) -> None:
    def fail(memory: Memory, asked: Asked) -> Reply:
        raise ZeroDivisionError("ours")

    log: list[Any] = []
    with pytest.raises(ZeroDivisionError, match="ours"):
        run([rivers(protocol)], LENGTHS, lambda: ToldMethod(fail, "broken", log=log), lambda: ToldMethod(right))
    assert log == ["broken made", ["q0", "q9", "q12"], "broken closed"]


def test_what_was_measured_before_a_failure_is_there(protocol: Protocol) -> None:
    def fail(memory: Memory, asked: Asked) -> Reply:
        if len(memory.numbers) > 10:
            raise ZeroDivisionError("ours")
        return right(memory, asked)

    evaluator = Evaluator([rivers(protocol)], LENGTHS, 3, 1e6)
    with pytest.raises(ZeroDivisionError, match="ours"):
        evaluator.run({"first": lambda: ToldMethod(right, "first"), "broken": lambda: ToldMethod(fail, "broken")})
    measured = [("first", 10), ("first", 20), ("first", 40), ("broken", 10)]
    assert [(row.method, row.length) for row in evaluator.rows] == measured and not evaluator.whole
    assert len(evaluator.records) == 3 * len(measured)
    evaluator = Evaluator([rivers(protocol)], LENGTHS, 3, 1e6)
    assert evaluator.run({"": lambda: ToldMethod(right)}) == (evaluator.rows, evaluator.records) and evaluator.whole


REFUSALS = {
    UserError("lower per_memory"): "lower per_memory",
    torch.OutOfMemoryError("CUDA out of memory"): "does not fit on the card",
}


@pytest.mark.parametrize(("error", "note"), REFUSALS.items(), ids=["mistake", "memory"])
@pytest.mark.parametrize("where", ["trials", "pool", "prepare", "answer"])
def test_what_a_task_or_a_method_refuses_costs_its_cell_alone(
    where: str, error: Exception, note: str, protocol: Protocol
) -> None:
    def refusing(given: type) -> type:
        honest = getattr(given, where)

        def act(self: Any, *arguments: Any) -> Any:
            if 20 in (*arguments, getattr(self, "length", 0)):
                raise error
            return honest(self, *arguments)

        return type("Refusing", (given,), {where: act})

    task, method = (refusing(kind) if where in vars(kind) else kind for kind in (HandTask, ToldMethod))
    whole = rivers(protocol)
    rows, records = run(
        [task(whole.passages, whole.listed)], LENGTHS, lambda: method(right), lambda: ToldMethod(right, "next")
    )  # fmt: skip
    assert notes(rows)["told", 20] == note and len(rows) == 6
    spared = {("told", 10), ("told", 40), ("next", 10), ("next", 40)}
    assert spared <= {(row.method, row.length) for row in rows if row.scores}
    assert len(records) == 3 * sum(bool(row.scores) for row in rows)


@pytest.mark.parametrize(("error", "note"), REFUSALS.items(), ids=["mistake", "memory"])
def test_a_method_that_cannot_be_made_is_left_out_with_the_reason(
    error: Exception, note: str, protocol: Protocol
) -> None:
    def make() -> Method:
        raise error

    finding = rivers(protocol, answers=False)
    ranked = ToldMethod(lambda memory, asked: [1])
    evaluator = Evaluator([finding], LENGTHS, 3, 1e6)
    rows, _ = evaluator.run({"untrained": make, "told": lambda: ranked})
    assert notes(rows) == {("untrained", length): note for length in LENGTHS}
    assert [(row.method, row.length) for row in rows if row.scores] == [("told", length) for length in LENGTHS]
    assert evaluator.whole, "and nothing is cut short by it"


def test_a_method_is_let_go_before_the_next_is_made_and_every_cell_is_told_at_once(protocol: Protocol) -> None:
    log: list[Any] = []
    makers = [lambda name=name: ToldMethod(right, name, log=log) for name in ("a", "b")]
    run([rivers(protocol)], (10, 20), *makers, tell=lambda row: log.append((row.method, row.length)))
    three = ["q0", "q9", "q12"]
    assert log == [
        "a made", three, ("a", 10), three, ("a", 20), "a closed",
        "b made", three, ("b", 10), three, ("b", 20), "b closed",
    ]  # fmt: skip
