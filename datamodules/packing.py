"""Packing: a plan's rows become the tensors of a pack.

The invariant: in a context's row, every document of the pack is what it is to that query. Those to be found now are
positives; those known to be relevant otherwise (another step, another part, the same text in another corpus) are
excluded; the rest are negatives. So no known positive is ever counted as a negative.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.planning import Asked, Plan, Planner
from msa_train.pack import Context, Contexts, Documents, MemoryPack
from msa_train.protocol import Protocol, Source


class Packer:
    """Makes the packs that a planner plans.

    Args:
        planner: Chooses queries and documents.
        protocol: Writes documents and contexts.
    """

    def __init__(self, planner: Planner, protocol: Protocol) -> None:
        self.planner, self.protocol = planner, protocol
        self.data, self.config = planner.data, planner.config

    @property
    def packs_per_epoch(self) -> int:
        """Packs until every query has come once (or as often as its corpus' weight says)."""
        return self.planner.packs_per_epoch

    def plan(self, index: int) -> Plan:
        """What pack `index` holds."""
        return self.planner.plan(index)

    def pack(self, index: int) -> MemoryPack:
        """Builds pack `index`. Its step counts are its own; `PackDataset` knows those of the whole step."""
        plan, data = self.plan(index), self.data
        number = {document: place for place, document in enumerate(plan.documents, start=1)}
        source = {row: Source(number[row], data.document(row).tolist()) for row in plan.documents}
        contexts = Contexts.build(self.protocol.head(), [self._context(asked, source) for asked in plan.asked])
        positive_QD, excluded_QD = self._relevance(plan)
        asked = sum(1 for one in plan.asked if one.steps)
        return MemoryPack(
            documents=Documents.build([self.protocol.document(one) for one in source.values()], self.config.chunk_size),
            contexts=contexts,
            positive_QD=positive_QD,
            excluded_QD=excluded_QD,
            document_ids=tuple(data.document_id(row) for row in plan.documents),
            query_ids=tuple(data.query(one.query, "id") for one in plan.asked),
            asked=asked,
            query_steps=tuple(max(len(one.steps) - 1, 0) for one in plan.asked),
            index=index,
            step_labels=len(contexts.label_target_N),
            step_queries=asked,
        )

    def counts(self, index: int) -> tuple[int, int]:
        """Labelled tokens and queries with a positive of pack `index`, from its plan alone."""
        plan = self.plan(index)
        number = {document: place for place, document in enumerate(plan.documents, start=1)}
        labels = 0
        for asked in plan.asked:
            answer = len(self._answer(asked))
            if asked.steps:
                labels += self.protocol.labels(
                    None if asked.distractors else [number[row] for row in asked.steps[-1]],
                    answer if asked.answered else None,
                )
            else:
                labels += answer + 1
        return labels, sum(1 for asked in plan.asked if asked.steps)

    def _context(self, asked: Asked, source: dict[int, Source]) -> Context:
        question, answer = self.data.question(asked.query).tolist(), self._answer(asked)
        if not asked.steps:
            return self.protocol.instruction(question, answer)
        steps = [sorted((source[row] for row in step), key=lambda one: one.number) for step in asked.steps]
        others = [source[row] for row in asked.distractors]
        return self.protocol.context(question, steps, answer if asked.answered else None, others)

    def _answer(self, asked: Asked) -> list[int]:
        answer = self.data.answer(asked.query) if asked.answered else None
        return [] if answer is None else answer.tolist()

    def _relevance(self, plan: Plan) -> tuple[Tensor, Tensor]:
        place = {document: number for number, document in enumerate(plan.documents)}
        same: dict[int, list[int]] = {}  # places of the documents that hold one text
        for row, number in place.items():
            same.setdefault(int(self.data.digest_D[row]), []).append(number)
        positive_QD = torch.zeros(len(plan.asked), len(place), dtype=torch.bool)
        excluded_QD = torch.zeros_like(positive_QD)
        for query, asked in enumerate(plan.asked):
            if not asked.steps:
                excluded_QD[query] = True
                continue
            known = self.planner.known(asked.query)
            excluded_QD[query, [number for digest in known for number in same.get(digest, ())]] = True
            wanted = [place[row] for row in asked.steps[-1]]
            positive_QD[query, wanted], excluded_QD[query, wanted] = True, False
        return positive_QD, excluded_QD


class PackDataset(Dataset[MemoryPack]):
    """Packs with the counts of the optimiser step that each belongs to, through the stages of a curriculum.

    The counts come from plans, not from ranks talking to each other: a pack is a pure function of its index, so every
    rank can work out what the others hold.

    Args:
        stages: Step from which each packer serves, ascending from 0.
        packs_per_step: Packs of one optimiser step over all ranks and accumulations.
        cycle: Repeat the first `cycle` packs of a stage for ever (to overfit them); 0 for never.
    """

    def __init__(self, stages: dict[int, Packer], packs_per_step: int = 1, cycle: int = 0) -> None:
        self.stages, self.packs_per_step, self.cycle = stages, packs_per_step, cycle
        self._counted: tuple[int, tuple[int, int]] = (-1, (0, 0))  # the last step and its counts

    def __getitem__(self, index: int) -> MemoryPack:
        packer, source = self._source(index)
        pack = replace(packer.pack(source), index=index)
        if self.packs_per_step == 1:
            return pack
        step = index // self.packs_per_step
        if self._counted[0] != step:
            self._counted = step, self._count_step(step)
        labels, queries = self._counted[1]
        return replace(pack, step_labels=labels, step_queries=queries)

    def _source(self, index: int) -> tuple[Packer, int]:
        """The packer that serves an index, and the pack's number within its stage."""
        step = index // self.packs_per_step
        start = max(first for first in self.stages if first <= step)
        within = index - start * self.packs_per_step
        return self.stages[start], within % self.cycle if self.cycle else within

    def _count_step(self, step: int) -> tuple[int, int]:
        first = step * self.packs_per_step
        sources = [self._source(index) for index in range(first, first + self.packs_per_step)]
        counts = [packer.counts(source) for packer, source in sources]
        return sum(labels for labels, _ in counts), sum(queries for _, queries in counts)
