"""Evaluation: every method, every task, every length, within a budget of time.

The shortest memories come first, so that whatever there is time for, there is a curve from its beginning. A cell
(method, task, length) for which the time would not do is left out with a note, and so are the longer ones; one that
takes longer than foreseen ends early, with the questions that it came to; one that a method or a task refuses, or that
the card has no room for, ends with the reason. Behind the cells of a length come the means over tasks. The invariant:
apart from where time ends it, a cell's scores depend on the method, the task and the length alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import TypeVar

import torch

from msa_train.errors import UserError
from msa_train.evaluation.judge import Judge
from msa_train.evaluation.methods import Method, Reply, Unmade
from msa_train.evaluation.pace import Pace
from msa_train.evaluation.ranks import Ranks
from msa_train.evaluation.scores import RANKED, Mean, found_share, ranking_scores
from msa_train.evaluation.task import Asked, Memory, Task, means

DEPTHS = 10  # bands of a depth heat map
Result = TypeVar("Result")


@dataclass(frozen=True)
class Row:
    """A cell: what a method scores on a task with memories of one length; or the mean over several tasks.

    Args:
        method: Its name.
        task: Its name, or that of the mean.
        length: Tokens asked for.
        tokens: Tokens of the memories, on average.
        documents: Documents of the memories, on average.
        scores: Mean of every score; none where nothing was asked.
        depths: Of the task's own score, mean and questions in every tenth of the memory that holds the answer; none
            of a mean over tasks.
        seconds: Time that it took, encoding included.
        note: What is to be said of it.
    """

    method: str
    task: str
    length: int
    tokens: float = 0.0
    documents: float = 0.0
    scores: Mapping[str, Mean] = field(default_factory=dict)
    depths: Sequence[tuple[float, int]] = ()
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Record:
    """What became of a question.

    Args:
        method: Who answered.
        task: Of which task.
        length: Over how many tokens.
        id: Its name.
        question: Its words.
        wanted: Right answers.
        gold: Names of the documents that hold them.
        answer: What was answered; None where documents were ranked alone.
        documents: Names of those retrieved, or ranked first.
        depth: Where the first gold document begins.
        scores: What it scored.
        notes: What did not go as it should.
    """

    method: str
    task: str
    length: int
    id: str
    question: str
    wanted: tuple[str, ...]
    gold: tuple[str, ...]
    answer: str | None
    documents: tuple[str, ...]
    depth: float
    scores: Mapping[str, float]
    notes: tuple[str, ...]


@dataclass
class _Cell:
    """What is gathered of a cell."""

    records: list[Record] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    preparing: float = 0.0  # seconds
    note: str = ""


class Evaluator:
    """Runs methods over tasks.

    Args:
        tasks: Opened tasks, each with a name of its own.
        lengths: Tokens of the memories, ascending.
        k: Cutoff of recall@k.
        budget_s: Seconds for all of it. The first method may take half of it where there are others, which then share
            the rest.
        judge: Grades answers, where there is one.
        ranks: Who takes part.
        tell: Told of every cell as it is done, on the first rank.
        clock: Seconds from anywhere.
        stop: Whether to end with what there is; any rank's word counts.

    Raises:
        UserError: The tasks of a group have different headline scores.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        lengths: Sequence[int],
        k: int,
        budget_s: float,
        judge: Judge | None = None,
        ranks: Ranks = Ranks(),
        tell: Callable[[Row], object] = lambda row: None,
        clock: Callable[[], float] = time.monotonic,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        assert list(lengths) == sorted(set(lengths)) and len({task.name for task in tasks}) == len(tasks)
        self.tasks, self.lengths, self.k, self.budget_s = tasks, lengths, k, budget_s
        self.judge, self.ranks, self.tell, self.clock, self.stop = judge, ranks, tell, clock, stop
        self.means = means(tasks)
        self.rows: list[Row] = []
        """Cells that are done, on the first rank; they are there whatever ends the run."""
        self.records: list[Record] = []
        """Questions of these cells, on the first rank."""
        self.stopped = False
        """Whether a rank was told to stop."""
        self.whole = False
        """Whether it came to its end."""

    def run(self, methods: Mapping[str, Callable[[], Method]]) -> tuple[list[Row], list[Record]]:
        """Every cell's row and every question's record, on the first rank; nothing on the others.

        Args:
            methods: How each is made; a method is let go before the next is made.
        """
        end = self.clock() + self.budget_s
        for place, (name, make) in enumerate(methods.items()):
            if self._told_to_stop():
                break  # making one may take as long as there is left
            now, others = self.clock(), len(methods) - place - 1
            share = 2 if place == 0 and others else others + 1
            made, why_not = self._unless_refused(make)
            method = made or Unmade(name, why_not)
            try:
                for row, found in self._cells(method, now + (end - now) / share):
                    self.rows.append(row)
                    self.records.extend(found)
            finally:
                method.close()
        self.whole = not self.stopped
        return self.rows, self.records

    def _cells(self, method: Method, deadline: float) -> Iterator[tuple[Row, list[Record]]]:
        """Cells as they are done, on the first rank."""
        pace = Pace(method.growth)
        for length in self.lengths:
            done: dict[str, tuple[Row, list[Record]]] = {}
            for task in self.tasks:
                foreseen = self.ranks.together(partial(self._foreseen, method, task, length, deadline, pace))
                note = "left out: told to stop" if self._told_to_stop() else self.ranks.told(foreseen)
                started = self.clock()
                cell = _Cell(note=note) if note else self._cell(method, task, length, deadline)
                whole = not cell.note
                self.ranks.together(partial(self._grade, task, cell))
                seconds = self.clock() - started
                if whole:
                    pace.took(task, length, cell.preparing, seconds - cell.preparing)
                row = self.ranks.together(partial(self._row, method, task, length, cell, seconds))
                if row is not None:
                    done[task.name] = row, cell.records
                    yield done[task.name]
            for name, tasks in self.means.items():
                row = self.ranks.together(partial(self._mean, name, tasks, done))
                if row is not None:
                    yield row, []

    def _told_to_stop(self) -> bool:
        """Whether some rank was. All ranks ask at the same places."""
        self.stopped = self.stopped or self.ranks.anyone(self.stop())
        return self.stopped

    def _foreseen(self, method: Method, task: Task, length: int, deadline: float, pace: Pace) -> str:
        """Why a cell is left out; empty if it is not."""
        reach = task.reach()
        if reach is not None and length > reach:
            return f"there are documents for {reach:,} tokens"
        if method.limit is not None and length > method.limit:
            return f"the backbone has {method.limit:,} positions"
        needed, left = pace.needed(task, length), deadline - self.clock()
        if left <= 0:
            return "left out: no time is left"
        return f"left out: takes about {needed:.0f} s, {left:.0f} s are left" if needed > left else ""

    def _cell(self, method: Method, task: Task, length: int, deadline: float) -> _Cell:
        cell, batches = _Cell(), _batches(task, length, method.together)
        started = self.clock()
        _, cell.note = self._unless_refused(partial(method.prepare, task, length))
        cell.preparing = self.clock() - started
        while not cell.note:
            memories, cell.note = self._unless_refused(partial(next, batches, []))
            if not memories:
                break
            late = bool(cell.records) and self.clock() > deadline
            if self._told_to_stop() or self.ranks.told(late):
                why = "told to stop" if self.stopped else "no time for more questions"
                cell.note = f"{'ended early' if cell.records else 'left out'}: {why}"
                break
            found, cell.note = self._unless_refused(partial(self._asked, method, task, memories))
            if found is None:
                break
            if self.ranks.rank == 0:
                cell.tokens.extend(memory.trial.tokens for memory in memories)
                cell.documents.extend(len(memory.numbers) for memory in memories)
            cell.records.extend(self.ranks.together(partial(self._records, method, task, length, memories, found)))
        return cell

    def _asked(self, method: Method, task: Task, memories: Sequence[Memory]) -> Sequence[Sequence[Reply | list[int]]]:
        return method.answer(task, memories) if task.answers else method.rank(task, memories, max(self.k, RANKED))

    def _unless_refused(self, act: Callable[[], Result]) -> tuple[Result | None, str]:
        """What `act` gives on this rank; or, on all ranks where one of them refuses, nothing and the reason."""

        def tried() -> tuple[Result | None, str]:
            try:
                return act(), ""
            except UserError as reason:  # a question too long costs its cell, not the run
                return None, str(reason)
            except torch.OutOfMemoryError:
                return None, "does not fit on the card"

        found, reason = self.ranks.together(tried)
        reason = self.ranks.anyone(reason)
        return (None if reason else found), reason

    def _records(
        self,
        method: Method,
        task: Task,
        length: int,
        memories: Sequence[Memory],
        found: Sequence[Sequence[Reply | list[int]]],
    ) -> list[Record]:
        if self.ranks.rank > 0:
            return []
        pairs = [
            (memory, asked, one)
            for memory, replies in zip(memories, found, strict=True)
            for asked, one in zip(memory.trial.asked, replies, strict=True)
        ]
        return [
            _record(method, task, length, memory, asked, one, self._scores(task, asked, one))
            for memory, asked, one in pairs
        ]

    def _grade(self, task: Task, cell: _Cell) -> None:
        """Adds the judge's grades. A judge that cannot be reached is told of, and costs nothing but its grades."""
        if self.judge is None or not task.judged or not cell.records:
            return
        try:
            grades = self.judge.grade([(one.question, one.wanted, one.answer or "") for one in cell.records])
        except UserError as error:
            cell.note = "; ".join(filter(None, [cell.note, f"not graded: {error}"]))
            return
        cell.records = [
            one if grade is None else replace(one, scores={**one.scores, "judge": float(grade)})
            for one, grade in zip(cell.records, grades, strict=True)
        ]

    def _scores(self, task: Task, asked: Asked, one: Reply | list[int]) -> dict[str, float]:
        if isinstance(one, list):
            return ranking_scores(one, asked.gold, self.k)
        scores = {**task.score(asked, one.text), "empty": float(not one.text.strip())}
        if one.documents is not None:
            scores["gold_recall"] = found_share(one.documents, asked.gold)
        return scores

    def _row(self, method: Method, task: Task, length: int, cell: _Cell, seconds: float) -> Row | None:
        """A cell's row, once it is told; nothing on the other ranks."""
        if self.ranks.rank > 0:
            return None
        row = self._summary(method, task, length, cell, seconds)
        self.tell(row)
        return row

    def _mean(self, name: str, tasks: Sequence[Task], done: Mapping[str, tuple[Row, list[Record]]]) -> Row | None:
        """The row of a mean over tasks, once it is told; nothing on the other ranks."""
        if self.ranks.rank > 0:
            return None
        row = _over(name, [done[task.name] for task in tasks])
        self.tell(row)
        return row

    def _summary(self, method: Method, task: Task, length: int, cell: _Cell, seconds: float) -> Row:
        if not cell.records:
            return Row(method.name, task.name, length, note=cell.note, seconds=seconds)
        names = dict.fromkeys(name for record in cell.records for name in record.scores)
        bands: list[list[float]] = [[] for _ in range(DEPTHS)]
        for record in cell.records:
            bands[min(int(record.depth * DEPTHS), DEPTHS - 1)].append(record.scores[task.metric])
        return Row(
            method.name,
            task.name,
            length,
            tokens=sum(cell.tokens) / len(cell.tokens),
            documents=sum(cell.documents) / len(cell.documents),
            scores={
                name: Mean.of([record.scores[name] for record in cell.records if name in record.scores])
                for name in names
            },
            depths=tuple((sum(band) / len(band) if band else 0.0, len(band)) for band in bands),
            seconds=seconds,
            note=cell.note,
        )


def _over(name: str, done: Sequence[tuple[Row, list[Record]]]) -> Row:
    """The mean over several tasks' cells of one method and length."""
    rows = [row for row, _ in done]
    mean = Row(rows[0].method, name, rows[0].length, seconds=sum(row.seconds for row in rows))
    missing = [row.task for row in rows if not row.scores]
    if missing:
        return replace(mean, note=f"no mean without {', '.join(missing)}")
    notes = dict.fromkeys(row.note for row in rows if row.note)
    return replace(
        mean,
        tokens=fmean(row.tokens for row in rows),
        documents=fmean(row.documents for row in rows),
        scores={
            score: Mean.over([[one.scores[score] for one in records if score in one.scores] for _, records in done])
            for score in rows[0].scores
            if all(score in row.scores for row in rows)
        },
        note="; ".join(f"{note} ({', '.join(row.task for row in rows if row.note == note)})" for note in notes),
    )


def _record(
    method: Method, task: Task, length: int, memory: Memory, asked: Asked, one: Reply | list[int],
    scores: Mapping[str, float],
) -> Record:  # fmt: skip
    documents = one if isinstance(one, list) else one.documents or ()
    return Record(
        method=method.name,
        task=task.name,
        length=length,
        id=asked.id,
        question=asked.text,
        wanted=asked.answers,
        gold=tuple(memory.passage(number).id for number in asked.gold),
        answer=None if isinstance(one, list) else one.text,
        documents=tuple(memory.passage(number).id for number in documents),
        depth=asked.depth,
        scores=scores,
        notes=() if isinstance(one, list) else one.notes,
    )


def _batches(task: Task, length: int, together: int) -> Iterator[list[Memory]]:
    """A task's memories, as many at a time as have so many questions."""
    pool, batch = task.pool(length), list[Memory]()
    for trial in task.trials(length):
        batch.append(Memory(pool, trial))
        if sum(len(memory.trial.asked) for memory in batch) >= together:
            yield batch
            batch = []
    if batch:
        yield batch
