"""The two training losses and how they become means over the global batch.

Routing: eq. 5 of the paper, for positive i of a query with negatives N, at temperature tau:
    -log( exp(s_i/tau) / (exp(s_i/tau) + sum_{j in N} exp(s_j/tau)) )  =  softplus(logsumexp_N(s/tau) - s_i/tau)
Other positives are not in the denominator ("decoupled"). Losses come back as sums; `global_mean` divides them.

Shapes: L routed layers, Q queries, D documents, N labelled tokens, M model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

RoutingLoss = Literal["decoupled", "coupled", "focal"]
_NEVER = -1e30  # a finite stand-in for -inf: logsumexp over nothing but -inf has a NaN gradient
_FOCAL_EPS = 1e-10  # the published focal loss adds this inside its logarithm; fitted on its fixtures to 1e-6


def routing_loss(
    score_LQD: Tensor, positive_QD: Tensor, temperature: float = 0.1, kind: RoutingLoss = "decoupled"
) -> Tensor:
    """Routing loss per layer and query: the mean over the query's positives, 0 for a query without any.

    One query, scores [0.2, 0.1, 0.0], the first a positive, tau 0.1: -log(e^2 / (e^2 + e^1 + e^0)) = 0.4076.

    Args:
        score_LQD: Document scores (any leading dimensions before D), float; -inf where a document takes no part.
        positive_QD: True where a document answers the query, bool; every other document is a negative.
        temperature: tau.
        kind: `decoupled` is eq. 5; `coupled` keeps the other positives in the denominator; `focal` weighs the
            decoupled terms by (1 - p)^2, as in the published code.

    Returns:
        Loss [L, Q], float32. Queries are averaged by the caller: see `global_mean`.
    """
    logit = score_LQD.float().masked_fill(score_LQD.isneginf(), _NEVER) / temperature
    if kind == "coupled":
        loss = -torch.log_softmax(logit, dim=-1)
    else:
        negatives = torch.logsumexp(logit.masked_fill(positive_QD, _NEVER), dim=-1, keepdim=True)
        loss = F.softplus(negatives - logit)
        if kind == "focal":
            probability = torch.sigmoid(logit - negatives)
            loss = -((1 - probability) ** 2) * torch.log(probability + _FOCAL_EPS)
    per_query = loss.masked_fill(~positive_QD, 0.0).sum(-1)
    return per_query / positive_QD.sum(-1).clamp_min(1)


def label_cross_entropy(
    hidden_NM: Tensor, target_N: Tensor, head: Callable[[Tensor], Tensor], chunk: int = 2048, together: bool = False
) -> Tensor:
    """Sum of the next-token cross entropy over labelled positions, with logits for `chunk` of them at a time.

    Logits of 65,536 tokens over 151,936 words take 20 GB in bf16; here neither more rows than are labelled nor more
    than `chunk` of them ever exist, in the backward pass too (each chunk is recomputed).

    Args:
        hidden_NM: States at the labelled positions.
        target_N: Token ids to predict, int64.
        head: Maps [n, M] to logits [n, V] (final norm and language-model head).
        chunk: Rows of logits that may exist at once.
        together: Call the head as often as the rank with the most labels does, at last with no rows: where each call
            gathers its weights, ranks that call it more often would wait for the others for ever. All ranks must call.
    """

    def part(hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), target, reduction="sum")

    count = max(-(-len(target_N) // chunk), 1)  # no label at all still runs the head: every rank needs its graph
    if together:
        count = _largest(count)
    parts = []
    for start in range(0, count * chunk, chunk):
        rows = slice(start, start + chunk)
        if torch.is_grad_enabled() and count > 1:
            parts.append(checkpoint(part, hidden_NM[rows], target_N[rows], use_reentrant=False))
        else:
            parts.append(part(hidden_NM[rows], target_N[rows]))
    return torch.stack(parts).sum()


def _largest(count: int) -> int:
    """Of all ranks' counts: a word from host to host, which no device waits for."""
    told = torch.tensor(count)
    dist.all_reduce(told, dist.ReduceOp.MAX, group=_hosts(dist.group.WORLD))
    return int(told)


@functools.cache
def _hosts(world: Any) -> Any:
    return dist.new_group(backend="gloo")


def global_mean(local_sum: Tensor, step_count: int, world_size: int, accumulated: int) -> Tensor:
    """The loss whose gradient, once averaged over ranks and accumulated packs, is that of the global batch's mean.

    A mean of per-rank means weighs a rank with 3 labels as much as one with 300. So every pack carries the count of
    its whole optimiser step, the local *sum* is divided by it, and the averages that follow are undone in advance:
    the strategy (DDP, DeepSpeed) divides gradients by `world_size`, Lightning the loss by `accumulated`.

    >>> global_mean(torch.tensor(6.0), step_count=4, world_size=2, accumulated=1)   # two ranks average it to 6 / 4
    tensor(3.)
    """
    return local_sum * (world_size * accumulated / max(step_count, 1))
