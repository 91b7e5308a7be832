"""What is measured of routing: retrieval quality, and whether the router still tells queries apart.

Collapse does not show in the loss: the same few documents may be chosen for every query while it falls. So beside
recall, MRR and NDCG stand the entropy of what was selected, the share of documents that anybody selected, the share of
queries that the most popular document wins ("hubness"), and by how much right documents outscore wrong ones ("margin").

Shapes: L routed layers, Q queries, D documents, K selected documents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from msa_train.routing import order_documents, select_documents

RANKS = (1, 5)


def rank_documents(score_XD: Tensor) -> Tensor:
    """Place of every document, best 0; ties go to the lower document.

    >>> rank_documents(torch.tensor([[0.2, 0.9, 0.2]]))
    tensor([[1, 0, 2]])
    """
    return torch.argsort(order_documents(score_XD), dim=-1)


def retrieval_scores(score_XD: Tensor, positive_XD: Tensor, k: int) -> dict[str, Tensor]:
    """Recall@1, @5, @k, MRR and NDCG per query; every query needs a positive.

    Recall's denominator is min(positives, cutoff), so that a perfect ranking scores 1. NDCG is over the whole ranking.
    With scores (.9, .5, .1) and the second document relevant: recall@1 0, MRR 1/2, NDCG 1/log2(3).
    """
    rank = rank_documents(score_XD).float()
    relevant = positive_XD.float()
    number = relevant.sum(-1)
    result = {}
    for name, cutoff in (*((str(cutoff), cutoff) for cutoff in RANKS), ("k", k)):
        found = (relevant * (rank < cutoff)).sum(-1)
        result[f"recall@{name}"] = found / number.clamp(max=cutoff)
    first = torch.where(positive_XD, rank, torch.inf).amin(-1)
    result["mrr"] = 1 / (1 + first)
    # float32 by name: under bf16-true Lightning makes bfloat16 the default
    discount = 1 / torch.log2(torch.arange(score_XD.shape[-1], device=rank.device, dtype=torch.float32) + 2)
    ideal = discount.cumsum(0)[number.long() - 1]
    result["ndcg"] = (relevant / torch.log2(rank + 2)).sum(-1) / ideal
    return result


def score_margins(score_QD: Tensor, positive_QD: Tensor) -> Tensor:
    """By how much each query's best positive outscores its best negative. [Q]; NaN where a query lacks either.

    A document with a score of -inf is excluded: it is neither.

    >>> scores = torch.tensor([[0.75, 0.5, 0.25], [0.75, 0.5, -torch.inf]])
    >>> score_margins(scores, torch.tensor([[False, True, False], [True, True, False]]))
    tensor([-0.2500,     nan])
    """
    positive = score_QD.masked_fill(~positive_QD, -torch.inf).amax(-1)
    negative = score_QD.masked_fill(positive_QD, -torch.inf).amax(-1)
    return (positive - negative).where(positive.isfinite() & negative.isfinite(), torch.nan)


def selection_health(selected_QK: Tensor, documents: int, positive_QD: Tensor) -> dict[str, Tensor]:
    """Entropy, coverage, hubness and diversity of one pack's selections in one layer; scalars.

    Four queries whose best documents are 0, 0, 0 and 1 of 8, with four different positives: hubness 3/4; the
    distribution (3/4, 1/4) counts as 1.755 documents, so diversity is 1.755 / 4.

    Returns:
        entropy: of how often each document was selected, over log D: 1 where all come alike.
        coverage: share of the documents that some query selected.
        hubness: share of the queries won by the most popular document.
        diversity: effective number of first-ranked documents over the number of different positives (at most one a
            query); a router that finds them all reaches 1, one that sends every query to one place goes to 0.
    """
    count_D = torch.zeros(documents, dtype=torch.float32, device=selected_QK.device)
    taken_QK = (selected_QK >= 0).to(count_D.dtype)  # 0 where nothing was left to select
    place_QK = selected_QK.clamp_min(0)
    chosen = count_D.index_add(0, place_QK.flatten(), taken_QK.flatten())
    winners = count_D.index_add(0, place_QK[:, 0], taken_QK[:, 0])
    queries = taken_QK[:, 0].sum().clamp_min(1)
    wanted = torch.minimum(positive_QD.any(0).sum().clamp_min(1), queries)  # no more winners than queries
    return {
        "entropy": _entropy(chosen) / torch.log(count_D.new_tensor(float(max(documents, 2)))),
        "coverage": (chosen > 0).float().mean(),
        "hubness": winners.max() / queries,
        "diversity": _entropy(winners).exp() / wanted,
    }


def _entropy(count: Tensor) -> Tensor:
    share = count / count.sum().clamp_min(1)
    return -(share * share.clamp_min(1e-30).log()).sum()


class LossMeans(Metric):
    """Means of both losses over many packs and ranks: over labelled tokens, and over queries. A sum over a sum, never
    a mean of means."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.sums: Tensor
        self.counts: Tensor
        self.add_state("sums", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, lm_sum: Tensor, labels: int, routing_sum: Tensor, queries: int) -> None:
        """Adds a pack."""
        self.sums += torch.stack([lm_sum, routing_sum])
        self.counts += torch.tensor([labels, queries], dtype=torch.float64).to(self.counts.device, non_blocking=True)

    def compute(self) -> dict[str, Tensor]:
        """`lm` (nats per labelled token) and `routing` (per query)."""
        lm, routing = self.sums / self.counts.clamp_min(1)
        return {"lm": lm, "routing": routing}


class RoutingMetrics(Metric):
    """Retrieval and selection over many packs, for every routed layer and overall (mean score over layers).

    Args:
        layers: Numbers of the routed layers.
        k: Cutoff of recall@k. It stays k in the name where a pack has fewer documents.
    """

    full_state_update = False
    NAMES = (*(f"recall@{rank}" for rank in RANKS), "recall@k", "mrr", "ndcg")
    HEALTH = ("entropy", "coverage", "hubness", "diversity")

    def __init__(self, layers: tuple[int, ...], k: int) -> None:
        super().__init__()
        self.layers, self.k = layers, k
        rows = len(layers) + 1
        self.retrieval: Tensor
        self.health: Tensor
        self.queries: Tensor
        self.packs: Tensor
        self.margin: Tensor
        self.contested: Tensor
        self.add_state("retrieval", torch.zeros(rows, len(self.NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("health", torch.zeros(rows, len(self.HEALTH), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("queries", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("packs", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("margin", torch.zeros(rows, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("contested", torch.zeros(rows, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, score_LQD: Tensor, selected_LQK: Tensor, positive_QD: Tensor) -> None:
        """Adds a pack. Queries without a positive count in none of the retrieval scores, and those without a negative
        not in the margin either."""
        asked = positive_QD.any(-1)
        routed = asked.any()  # a pack of instructions alone says nothing of the router
        overall_QD = score_LQD.mean(0)
        selections = (*selected_LQK, select_documents(overall_QD, self.k))
        for row, (score_QD, selected_QK) in enumerate(zip((*score_LQD, overall_QD), selections, strict=True)):
            scores = retrieval_scores(score_QD, positive_QD | ~asked[:, None], self.k)
            self.retrieval[row] += torch.stack([(scores[name] * asked).sum() for name in self.NAMES])
            health = selection_health(selected_QK, score_QD.shape[-1], positive_QD)
            self.health[row] += routed * torch.stack([health[name] for name in self.HEALTH])
            margin_Q = score_margins(score_QD, positive_QD)
            self.margin[row] += margin_Q.nansum()
            self.contested[row] += (~margin_Q.isnan()).sum()
        self.queries += asked.sum()
        self.packs += routed

    def compute(self) -> dict[str, Tensor]:
        """Means: `recall@1`, ... overall, and `layer_{i}/recall@1`, ... for every routed layer."""
        retrieval = self.retrieval / self.queries.clamp_min(1)
        health = self.health / self.packs.clamp_min(1)
        margin = self.margin / self.contested.clamp_min(1)
        result = {}
        prefixes = (*(f"layer_{layer}/" for layer in self.layers), "")
        for row, prefix in enumerate(prefixes):
            result.update({prefix + name: value for name, value in zip(self.NAMES, retrieval[row], strict=True)})
            result.update({prefix + name: value for name, value in zip(self.HEALTH, health[row], strict=True)})
            result[prefix + "margin"] = margin[row]
        return result
