"""Losses: hand-worked numbers, edges, and the mean over a global batch that ranks and packs share unevenly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from msa_train.losses import RoutingLoss, global_mean, label_cross_entropy, routing_loss


def test_hand_worked_routing_loss() -> None:
    """Scores .2, .1, 0 at tau .1 are logits 2, 1, 0."""
    loss = routing_loss(torch.tensor([[0.2, 0.1, 0.0]]), torch.tensor([[True, False, False]]))
    expected = -math.log(math.e**2 / (math.e**2 + math.e + 1))
    assert math.isclose(loss.item(), expected, rel_tol=1e-6) and round(expected, 4) == 0.4076


def test_other_positives_are_not_in_the_denominator() -> None:
    positive = torch.tensor([[True, True, False]])
    low = routing_loss(torch.tensor([[0.2, 0.1, 0.0]]), positive)
    expected = (math.log1p(math.exp(0 - 2)) + math.log1p(math.exp(0 - 1))) / 2
    assert math.isclose(low.item(), expected, rel_tol=1e-6)
    coupled = routing_loss(torch.tensor([[0.2, 0.1, 0.0]]), positive, kind="coupled")
    assert coupled > low


def test_no_negative_and_no_positive_give_zero_and_a_finite_gradient() -> None:
    for positive in (torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)):
        scores = torch.tensor([[0.9, -0.9, 0.0]], requires_grad=True)
        loss = routing_loss(scores, positive)
        loss.sum().backward()
        assert loss.item() == 0 and scores.grad is not None and torch.isfinite(scores.grad).all()


def test_layers_and_queries_keep_their_places() -> None:
    scores = torch.randn(2, 3, 7)
    positive = torch.eye(3, 7, dtype=torch.bool)
    together = routing_loss(scores, positive)
    assert together.shape == (2, 3)
    for layer in range(2):
        for query in range(3):
            alone = routing_loss(scores[layer, query], positive[query])
            torch.testing.assert_close(together[layer, query], alone)


def test_cross_entropy_in_chunks_equals_the_whole() -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 13)
    hidden, target = torch.randn(11, 6, requires_grad=True), torch.randint(13, (11,))
    whole = F.cross_entropy(head(hidden), target, reduction="sum")
    wanted = torch.autograd.grad(whole, (hidden, head.weight))
    for chunk in (1, 4, 11, 99):
        parts = label_cross_entropy(hidden, target, head, chunk)
        torch.testing.assert_close(parts, whole)
        for ours, theirs in zip(torch.autograd.grad(parts, (hidden, head.weight)), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["decoupled", "coupled", "focal"])
def test_an_excluded_document_is_in_no_loss_and_gets_no_gradient(kind: RoutingLoss) -> None:
    score = torch.tensor([[0.2, 0.1, 0.9, 0.0]], requires_grad=True)
    positive = torch.tensor([[True, False, False, False]])
    excluded = torch.tensor([[False, False, True, False]])
    loss = routing_loss(score.masked_fill(excluded, -torch.inf), positive, kind=kind)
    alone = routing_loss(score[:, [0, 1, 3]], positive[:, [0, 1, 3]], kind=kind)
    torch.testing.assert_close(loss, alone)
    (gradient,) = torch.autograd.grad(loss.sum(), score)
    assert gradient.isfinite().all() and gradient[0, 2] == 0 and gradient[0, 0] < 0


# Two ranks, two accumulated packs each, with these many labelled tokens:
LABELS = ((3, 11), (0, 5))


def sample(rank: int, pack: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * rank + pack)
    size = LABELS[rank][pack]
    return torch.randn(size, 6, generator=generator), torch.randint(13, (size,), generator=generator)


def head_of_13() -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(6, 13)


def count_calls(rank: int, folder: str) -> None:
    """A head whose calls are collectives, as those of shared out weights are; the second rank has no label at all."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    head, calls = head_of_13(), []

    def gathered(hidden: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(torch.tensor(1.0))
        calls.append(len(hidden))
        return head(hidden)

    hidden, target = sample(rank, 1 - rank)  # 11 labels, and none
    hidden.requires_grad_()
    loss = label_cross_entropy(hidden, target, gathered, chunk=4, together=True)
    loss.backward()
    with torch.no_grad():
        again = label_cross_entropy(hidden, target, gathered, chunk=4, together=True)
    torch.save({"loss": loss.detach(), "again": again, "calls": calls, "grad": hidden.grad}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_of_uneven_labels_call_the_head_as_often(tmp_path: Path) -> None:
    mp.spawn(count_calls, args=(str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    hidden, target = sample(0, 1)
    whole = F.cross_entropy(head_of_13()(hidden.requires_grad_()), target, reduction="sum")
    whole.backward()
    for loss in (found[0]["loss"], found[0]["again"]):
        torch.testing.assert_close(loss, whole.detach())
    torch.testing.assert_close(found[0]["grad"], hidden.grad)
    assert found[1]["loss"] == found[1]["again"] == 0
    assert sorted(found[0]["calls"]) == 3 * [3] + 6 * [4], "forward, backward, and without gradient"
    assert found[1]["calls"] == 9 * [0]


def train_one_step(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = DistributedDataParallel(head_of_13())
    total = sum(map(sum, LABELS))
    for pack in range(2):
        hidden, target = sample(rank, pack)
        loss_sum = F.cross_entropy(model(hidden), target, reduction="sum")
        with model.no_sync() if pack == 0 else torch.enable_grad():
            (global_mean(loss_sum, total, world_size=2, accumulated=2) / 2).backward()  # Lightning's division
    torch.save({name: weight.grad for name, weight in model.module.named_parameters()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gradient_is_that_of_the_global_mean_on_two_ranks_with_uneven_counts(tmp_path: Path) -> None:
    mp.spawn(train_one_step, args=(str(tmp_path),), nprocs=2)
    head = head_of_13()
    everything = [sample(rank, pack) for rank in range(2) for pack in range(2)]
    hidden, target = (torch.cat(parts) for parts in zip(*everything, strict=True))
    assert len(target) == 19
    F.cross_entropy(head(hidden), target).backward()
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, weight in head.named_parameters():
            torch.testing.assert_close(gradients[name], weight.grad)
