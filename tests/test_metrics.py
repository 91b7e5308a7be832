"""Retrieval scores against torchmetrics, and what tells a collapsed router from a healthy one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional import retrieval as theirs

from msa_train.metrics import (
    LossMeans,
    RoutingMetrics,
    rank_documents,
    retrieval_scores,
    score_margins,
    selection_health,
)
from msa_train.routing import select_documents


def test_scores_equal_torchmetrics() -> None:
    torch.manual_seed(0)
    scores = torch.rand(40, 23)
    positive = torch.rand(40, 23) < 0.15
    positive[:, 4] = True
    ours = retrieval_scores(scores, positive, k=9)
    for row in range(40):
        number = int(positive[row].sum())
        for name, cutoff in (("recall@1", 1), ("recall@5", 5), ("recall@k", 9)):
            recall = theirs.retrieval_recall(scores[row], positive[row], top_k=cutoff) * number / min(number, cutoff)
            torch.testing.assert_close(ours[name][row], recall)
        torch.testing.assert_close(ours["mrr"][row], theirs.retrieval_reciprocal_rank(scores[row], positive[row]))
        torch.testing.assert_close(
            ours["ndcg"][row], theirs.retrieval_normalized_dcg(scores[row], positive[row].long())
        )


def test_hand_worked_scores() -> None:
    ours = retrieval_scores(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[False, True, False]]), k=2)
    assert ours["recall@1"].item() == 0 and ours["recall@k"].item() == 1 and ours["mrr"].item() == 0.5
    assert math.isclose(ours["ndcg"].item(), 1 / math.log2(3), rel_tol=1e-6)


def test_ties_rank_by_number() -> None:
    assert rank_documents(torch.tensor([[0.2, 0.9, 0.2]])).tolist() == [[1, 0, 2]]


def test_k_beyond_the_documents_is_allowed() -> None:
    ours = retrieval_scores(torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool), k=16)
    assert ours["recall@k"].tolist() == [1, 1] and ours["recall@5"].tolist() == [1, 1]


def test_collapse_shows() -> None:
    wanted = torch.eye(8, 20, dtype=torch.bool)
    healthy = selection_health(torch.stack([torch.arange(8), torch.arange(8) + 8], 1), 20, wanted)
    collapsed = selection_health(torch.tensor([[3, 5]] * 8), 20, wanted)
    assert math.isclose(healthy["diversity"].item(), 1, rel_tol=1e-5) and healthy["hubness"].item() == 1 / 8
    assert math.isclose(collapsed["diversity"].item(), 1 / 8, rel_tol=1e-5) and collapsed["hubness"].item() == 1
    assert math.isclose(collapsed["coverage"].item(), 0.1, rel_tol=1e-6)
    assert math.isclose(healthy["coverage"].item(), 0.8, rel_tol=1e-6)
    assert collapsed["entropy"] < healthy["entropy"]


def test_several_positives_a_query_do_not_look_like_a_collapse() -> None:
    wanted = torch.eye(4).repeat_interleave(5, 1).bool()
    health = selection_health(torch.arange(4)[:, None] * 5, 20, wanted)
    assert math.isclose(health["diversity"].item(), 1, rel_tol=1e-5)


def test_hand_worked_diversity() -> None:
    """Best documents 0, 0, 0, 1 of 8 with four different positives."""
    health = selection_health(torch.tensor([[0], [0], [0], [1]]), 8, torch.eye(4, 8, dtype=torch.bool))
    effective = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert health["hubness"].item() == 0.75 and math.isclose(health["diversity"].item(), effective / 4, rel_tol=1e-5)


def test_metric_weighs_queries_not_packs_and_skips_those_without_a_positive() -> None:
    metric = RoutingMetrics((2, 3), k=2)
    right = torch.tensor([[0.9, 0.1, 0.0]])
    wrong = torch.tensor([[0.1, 0.9, 0.0]]).expand(3, 3)
    for scores in (right, wrong):
        positive = torch.zeros(scores.shape, dtype=torch.bool)
        positive[:, 0] = True
        selected = torch.zeros(2, len(scores), 1, dtype=torch.int64)
        metric.update(scores.expand(2, -1, -1), selected, positive)
    metric.update(right.expand(2, -1, -1), torch.zeros(2, 1, 1, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.bool))
    values = metric.compute()
    assert values["recall@1"].item() == 0.25 == values["layer_3/recall@1"].item()
    assert set(name.rpartition("/")[0] for name in values) == {"", "layer_2", "layer_3"}


def test_margin_is_the_best_positive_minus_the_best_negative_that_is_not_excluded() -> None:
    scores = torch.tensor([[0.9, 0.3, 0.5, -torch.inf], [-0.1, -0.4, -0.2, -torch.inf], [0.5, 0.1, 0.2, 0.3]])
    positive = torch.tensor([[False, True, False, False], [True, True, False, False], [False] * 4])
    found = score_margins(scores, positive)
    torch.testing.assert_close(found[:2], torch.tensor([0.3 - 0.9, -0.1 + 0.2]))
    assert found[2].isnan(), "no positive"
    assert score_margins(scores[:2, :2], positive[:2, :2])[1].isnan(), "no negative"


def test_mean_margin_is_over_the_queries_that_have_one() -> None:
    """A margin of 0.5, one of -0.25, and three queries that have none: no positive, no negative, all excluded."""
    metric = RoutingMetrics((4, 7), k=2)
    scores = torch.tensor([[0.75, 0.25], [0.25, 0.5], [0.9, 0.1], [0.8, 0.2], [-torch.inf, -torch.inf]])
    positive = torch.tensor([[True, False], [True, False], [False, False], [True, True], [False, False]])
    for rows in (slice(0, 1), slice(1, 5)):
        both = torch.stack([scores[rows], scores[rows] - 1])  # a shift of a layer's scores is no margin
        metric.update(both, torch.zeros(2, len(scores[rows]), 1, dtype=torch.int64), positive[rows])
    values = metric.compute()
    for name in ("margin", "layer_4/margin", "layer_7/margin"):
        assert math.isclose(values[name].item(), 0.125, rel_tol=1e-6), name


def packs(layers: int, generator: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Two packs: some queries without a positive, some documents excluded, some selections short."""
    found = []
    for queries, documents in ((7, 12), (5, 3)):
        score_LQD = torch.randn(layers, queries, documents, generator=generator)
        positive_QD = torch.rand(queries, documents, generator=generator) < 0.2
        positive_QD[0], positive_QD[1, 0], score_LQD[:, 2, 1:] = False, True, -torch.inf
        selected_LQK = torch.stack([select_documents(score_QD, 4) for score_QD in score_LQD])
        found.append((score_LQD, selected_LQK, positive_QD))
    return found


def test_rows_measured_together_are_each_layer_measured_alone() -> None:
    metric, given = RoutingMetrics((3, 5, 8), k=4), packs(3, torch.Generator().manual_seed(1))
    for pack in given:
        metric.update(*pack)
    values = metric.compute()
    for row, prefix in enumerate(("layer_3/", "layer_5/", "layer_8/", "")):
        sums: dict[str, list[torch.Tensor]] = {}
        for score_LQD, selected_LQK, positive_QD in given:
            score_QD = score_LQD[row] if prefix else score_LQD.mean(0)
            selected_QK = selected_LQK[row] if prefix else select_documents(score_QD, 4)
            asked = positive_QD.any(-1)
            margin_Q = score_margins(score_QD, positive_QD)
            alone = retrieval_scores(score_QD[asked], positive_QD[asked], 4)
            health = selection_health(selected_QK, score_QD.shape[-1], positive_QD)
            alone |= {name: value[None] for name, value in health.items()} | {"margin": margin_Q[~margin_Q.isnan()]}
            for name, value in alone.items():
                sums.setdefault(name, []).append(value)
        for name, parts in sums.items():
            torch.testing.assert_close(values[prefix + name], torch.cat(parts).double().mean(), msg=prefix + name)


def test_a_pack_takes_as_many_operations_for_many_layers_as_for_two() -> None:
    """What launches kernels is the host's time (benchmarks/results/smollm2_host.json)."""
    counted = []
    for layers in (2, 15):
        metric, (pack, _) = RoutingMetrics(tuple(range(layers)), k=4), packs(layers, torch.Generator().manual_seed(2))
        with Operations() as operations:
            metric.update(*pack)
        counted.append(operations.number)
    assert counted[0] == counted[1] < 150


class Operations(TorchDispatchMode):
    """Counts them."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_loss_mean_is_over_tokens_not_packs() -> None:
    means = LossMeans()
    means.update(torch.tensor(2.0), 1, torch.tensor(3.0), 1)
    means.update(torch.tensor(4.0), 5, torch.tensor(0.0), 2)
    assert means.compute()["lm"].item() == 1.0 and means.compute()["routing"].item() == 1.0


def test_scores_do_not_depend_on_torch_s_default_precision() -> None:
    """bf16-true makes bfloat16 the default, which counts to 256 and tells two discounts in a hundred apart."""
    generator = torch.Generator().manual_seed(0)
    score_QD = torch.rand(600, 40, generator=generator, dtype=torch.float32)
    positive_QD = torch.zeros(600, 40, dtype=torch.bool)
    positive_QD[torch.arange(600), torch.randint(40, (600,), generator=generator)] = True
    selected_QK = score_QD.topk(3).indices
    found = []
    for default in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            health = selection_health(selected_QK, 40, positive_QD)
            found.append({**retrieval_scores(score_QD, positive_QD, 3), **health})
        finally:
            torch.set_default_dtype(torch.float32)
    for name, value in found[0].items():
        assert value.dtype == torch.float32 and torch.equal(value, found[1][name]), name
