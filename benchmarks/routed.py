"""What benchmarks of the memory share: questions routed over a whole bank, and their recall."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from msa_train.decoding import begin
from msa_train.memory import MemoryBank
from msa_train.model import MemorySparseModel
from msa_train.protocol import Protocol
from msa_train.search import Found

BATCH = 32  # questions at a time
Questions = Sequence[tuple[str, set[str]]]  # what is asked, and the documents that answer it


def routed(
    model: MemorySparseModel,
    protocol: Protocol,
    bank: MemoryBank,
    questions: Questions,
    weights: Sequence[float],
    k: int,
) -> tuple[list[Found], Found]:
    """What each routed layer selects for every question, and the k best documents over layers; on the host."""
    heads = model.attention[model.routed_layers[0]].heads
    layers: list[list[Found]] = []
    best: list[Found] = []
    for first in range(0, len(questions), BATCH):
        asked = [protocol.asking(protocol.text(text)) for text, _ in questions[first : first + BATCH]]
        _, _, recalled, offsets = begin(model, protocol.head(), asked, bank.layers())
        best.append(bank.rank([one.query_XR for one in recalled], offsets, weights, heads, k).to("cpu"))
        layers.append([one.found.to("cpu") for one in recalled])
    return [_joined(parts) for parts in zip(*layers, strict=True)], _joined(best)


def recall_of(best: Found, bank: MemoryBank, questions: Questions) -> dict[str, float]:
    """Share of the questions that have one of their documents first, and among the first eight."""
    hits = [
        [bank.source(number) in gold for number in row[:8] if number > 0]
        for row, (_, gold) in zip(best.number_QK.tolist(), questions, strict=True)
    ]
    return {"recall@1": statistics.mean(row[0] for row in hits), "recall@8": statistics.mean(any(row) for row in hits)}


def _joined(parts: Sequence[Found]) -> Found:
    return Found(torch.cat([part.number_QK for part in parts]), torch.cat([part.score_QK for part in parts]))
