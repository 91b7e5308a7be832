"""What is measured of routing: retrieval quality, and whether the router still tells queries apart.

Collapse does not show in the loss: the same few documents may be chosen for every query while it falls. So beside
recall, MRR and NDCG stand the entropy of what was selected, the share of documents that anybody selected, the share of
queries that the most popular document wins ("hubness"), and by how much right documents outscore wrong ones ("margin").

Shapes: L routed layers, Q queries, D documents, K selected documents, X any number of dimensions; in RoutingMetrics
R rows, one for each routed layer and one for their mean. Rows are measured together: a GPU is handed a few kernels a
pack and not a few for every layer, which the host of a small model has no time for.
"""

from __future__ import annotations

import math

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
    """Recall@1, @5, @k, MRR and NDCG per query; every query needs a positive. Positives may be of fewer dimensions.

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


def score_margins(score_XQD: Tensor, positive_QD: Tensor) -> Tensor:
    """By how much each query's best positive outscores its best negative. [X, Q]; NaN where a query lacks either.

    A document with a score of -inf is excluded: it is neither.

    >>> scores = torch.tensor([[0.75, 0.5, 0.25], [0.75, 0.5, -torch.inf]])
    >>> score_margins(scores, torch.tensor([[False, True, False], [True, True, False]]))
    tensor([-0.2500,     nan])
    """
    positive = score_XQD.masked_fill(~positive_QD, -torch.inf).amax(-1)
    negative = score_XQD.masked_fill(positive_QD, -torch.inf).amax(-1)
    return (positive - negative).where(positive.isfinite() & negative.isfinite(), torch.nan)


def selection_health(selected_XQK: Tensor, documents: int, positive_QD: Tensor) -> dict[str, Tensor]:
    """Entropy, coverage, hubness and diversity of one pack's selections, each [X]: a scalar for those of one layer.

    Four queries whose best documents are 0, 0, 0 and 1 of 8, with four different positives: hubness 3/4; the
    distribution (3/4, 1/4) counts as 1.755 documents, so diversity is 1.755 / 4.

    Returns:
        entropy: of how often each document was selected, over log D: 1 where all come alike.
        coverage: share of the documents that some query selected.
        hubness: share of the queries won by the most popular document.
        diversity: effective number of first-ranked documents over the number of different positives (at most one a
            query); a router that finds them all reaches 1, one that sends every query to one place goes to 0.
    """
    taken_XQK = (selected_XQK >= 0).float()  # 0 where nothing was left to select
    place_XQK = selected_XQK.clamp_min(0)
    count_XD = taken_XQK.new_zeros(*selected_XQK.shape[:-2], documents)
    chosen_XD = count_XD.scatter_add(-1, place_XQK.flatten(-2), taken_XQK.flatten(-2))
    winners_XD = count_XD.scatter_add(-1, place_XQK[..., 0], taken_XQK[..., 0])
    queries_X = taken_XQK[..., 0].sum(-1).clamp_min(1)
    wanted_X = torch.minimum(positive_QD.any(0).sum().clamp_min(1), queries_X)  # no more winners than queries
    return {
        "entropy": _entropy(chosen_XD) / math.log(max(documents, 2)),
        "coverage": (chosen_XD > 0).float().mean(-1),
        "hubness": winners_XD.amax(-1) / queries_X,
        "diversity": _entropy(winners_XD).exp() / wanted_X,
    }


def _entropy(count_XD: Tensor) -> Tensor:
    share_XD = count_XD / count_XD.sum(-1, keepdim=True).clamp_min(1)
    return -(share_XD * share_XD.clamp_min(1e-30).log()).sum(-1)


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
        score_RQD = torch.cat([score_LQD, overall_QD[None]])
        selected_RQK = torch.cat([selected_LQK, select_documents(overall_QD, selected_LQK.shape[-1])[None]])
        scores = retrieval_scores(score_RQD, positive_QD | ~asked[:, None], self.k)
        self.retrieval += torch.stack([(scores[name] * asked).sum(-1) for name in self.NAMES], -1)
        health = selection_health(selected_RQK, score_LQD.shape[-1], positive_QD)
        self.health += routed * torch.stack([health[name] for name in self.HEALTH], -1)
        margin_RQ = score_margins(score_RQD, positive_QD)
        self.margin += margin_RQ.nansum(-1)
        self.contested += (~margin_RQ.isnan()).sum(-1)
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
