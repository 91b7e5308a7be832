"""Held-out evaluation on packs: the router and the language model, and BM25 on the same documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datamodules.collection import Collection
from datamodules.lexical import LexicalIndex
from datamodules.planning import Plan
from msa_train.metrics import LossMeans, RoutingMetrics, retrieval_scores
from msa_train.model import MemorySparseModel
from msa_train.pack import MemoryPack


@dataclass(frozen=True)
class Evaluation:
    """Means over held-out packs.

    Args:
        routing: RoutingMetrics' values, overall and per layer.
        lm: Nats per labelled token.
        queries: Queries counted.
        documents: Documents per pack, on average.
        random_recall: Recall@1 of a guess: the share of a query's pack that answers it, on average.
        steps: Per retrieval step of evidence chains: recall@1 and queries. One step where there are no chains.
    """

    routing: dict[str, float]
    lm: float
    queries: int
    documents: float
    random_recall: float
    steps: list[dict[str, float]]


@torch.no_grad()
def evaluate_packs(model: MemorySparseModel, packs: Iterable[MemoryPack], k: int) -> Evaluation:
    """The router and the language model on these packs, on this rank; the model's mode is left as it was."""
    device = next(model.parameters()).device
    routing, loss = RoutingMetrics(model.routed_layers, k).to(device), LossMeans().to(device)
    routing.sync_on_compute = loss.sync_on_compute = False
    documents: list[int] = []
    guess: list[float] = []
    found: list[tuple[int, float]] = []
    with _evaluating(model):
        for pack in packs:
            pack = pack.to(device)
            output = model(pack)
            routing.update(output.doc_score_LQD, output.selected_LQK, pack.positive_QD)
            loss.update(
                model.label_loss(output, pack.contexts),
                len(pack.contexts.label_target_N),
                torch.zeros((), device=device),
                pack.asked,
            )
            documents.append(len(pack.document_ids))
            asked_Q = pack.positive_QD.any(1)
            guess.extend(pack.positive_QD[asked_Q].float().mean(1).tolist())
            scores = retrieval_scores(output.doc_score_LQD.mean(0)[asked_Q], pack.positive_QD[asked_Q], k)
            steps_Q = torch.tensor(pack.query_steps)[asked_Q.cpu()].tolist()
            found.extend(zip(steps_Q, scores["recall@1"].tolist(), strict=True))
    values = {name: float(value) for name, value in routing.compute().items()}
    return Evaluation(
        routing=values,
        lm=float(loss.compute()["lm"]),
        queries=int(routing.queries),
        documents=float(np.mean(documents)),
        random_recall=float(np.mean(guess)),
        steps=[
            {"recall@1": float(np.mean(recalls)), "queries": len(recalls)}
            for step in range(max((step for step, _ in found), default=-1) + 1)
            if (recalls := [recall for other, recall in found if other == step])
        ],
    )


def bm25_recall(packs: Iterable[tuple[Plan, MemoryPack]], data: Collection, k: int) -> dict[str, float]:
    """BM25's retrieval scores over the same packs: the question, and the text of what was retrieved before, against
    the documents' text."""
    found = []
    for plan, pack in packs:
        asked_Q = pack.positive_QD.any(1)
        score_QD = bm25_scores(plan, plan.documents, data).masked_fill(pack.excluded_QD, -torch.inf)
        found.append(retrieval_scores(score_QD[asked_Q], pack.positive_QD[asked_Q], k))
    return {name: float(torch.cat([scores[name] for scores in found]).mean()) for name in found[0]}


def bm25_scores(plan: Plan, documents: Sequence[int], data: Collection) -> Tensor:
    """BM25 scores [Q, D] of a plan's contexts over these documents."""
    index = LexicalIndex([data.document_text(row) for row in documents])
    asked = [
        " ".join([data.query(one.query, "text"), *(data.document_text(row) for step in one.steps[:-1] for row in step)])
        for one in plan.asked
    ]
    return torch.from_numpy(np.stack([index.scores(words) for words in asked]))


class _evaluating:
    """Evaluation mode for a while."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.was_training = self.model.training
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.was_training)
