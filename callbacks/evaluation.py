"""Held-out evaluations: the router on packs and on memories longer than any pack, and BM25 on the same documents.

Documents do not depend on their neighbours, so the largest memory is encoded once and every shorter one is its prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import bm25s
import numpy as np
import torch
from torch import Tensor

from datamodules import PackedMemory
from datamodules.packing import TokenizedCorpus
from msa_train.metrics import LossMeans, RoutingMetrics, retrieval_scores
from msa_train.model import DocumentMemory, MemorySparseModel
from msa_train.pack import Documents, MemoryPack
from msa_train.protocol import Source


@dataclass(frozen=True)
class Evaluation:
    """Means over held-out packs.

    Args:
        routing: RoutingMetrics' values, overall and per layer.
        lm: Nats per labelled token.
        queries: Queries counted.
        documents: Documents per pack, on average.
        random_recall: Recall@1 of a guess: the share of a query's pack that answers it, on average.
    """

    routing: dict[str, float]
    lm: float
    queries: int
    documents: float
    random_recall: float


@torch.no_grad()
def evaluate_packs(model: MemorySparseModel, packs: Iterable[MemoryPack], k: int) -> Evaluation:
    """The router and the language model on these packs, on this rank; the model's mode is left as it was."""
    device = next(model.parameters()).device
    routing, loss = RoutingMetrics(model.routed_layers, k).to(device), LossMeans().to(device)
    routing.sync_on_compute = loss.sync_on_compute = False
    documents, guess = [], []
    with _evaluating(model):
        for pack in packs:
            pack = pack.to(device)
            output = model(pack)
            routing.update(output.doc_score_LQD, output.selected_LQK, pack.positive_QD)
            loss.update(
                model.label_loss(output, pack.contexts),
                len(pack.contexts.label_target_N),
                torch.zeros((), device=device),
                pack.queries,
            )
            documents.append(len(pack.document_ids))
            guess.extend(pack.positive_QD.float().mean(1).tolist())
    values = {name: float(value) for name, value in routing.compute().items()}
    return Evaluation(
        routing=values,
        lm=float(loss.compute()["lm"]),
        queries=int(routing.queries),
        documents=float(np.mean(documents)),
        random_recall=float(np.mean(guess)),
    )


def bm25_recall(packs: Iterable[MemoryPack], data: TokenizedCorpus, k: int) -> dict[str, float]:
    """BM25's retrieval scores over the same packs, from the texts that their documents hold."""
    texts = _Texts(data)
    found = [retrieval_scores(texts.bm25(pack.query_ids, pack.document_ids), pack.positive_QD, k) for pack in packs]
    return {name: float(torch.cat([scores[name] for scores in found]).mean()) for name in found[0]}


@dataclass(frozen=True)
class LengthResult:
    """Recall over a memory of a given length.

    Args:
        factor: Length in trained packs.
        documents: Documents in the memory.
        tokens: Tokens in the memory.
        recall: Recall@1 of every query, router.
        bm25: Recall@1 of every query, BM25.
    """

    factor: int
    documents: int
    tokens: int
    recall: Tensor
    bm25: Tensor


def evaluate_lengths(
    model: MemorySparseModel, data: PackedMemory, packs: Sequence[MemoryPack], factors: Sequence[int], k: int
) -> list[LengthResult]:
    """Recall@1 of the packs' queries over memories from one pack to many.

    Every memory begins with a pack's own documents, where the answers are, and grows by other documents of the corpus,
    never copies and none that is known to answer.

    Args:
        model: The model.
        data: Where documents come from.
        packs: Held-out packs; each is the start of a memory of its own.
        factors: Lengths in multiples of the token budget of a pack, ascending. Lengths beyond the corpus are left out.
        k: Cutoff of recall@k.
    """
    assert data.data is not None
    device = next(model.parameters()).device
    texts = _Texts(data.data)
    budget = data.packing.document_tokens
    distractors = _distractors(data, packs, budget * (max(factors) - 1))
    wrapped = [data.protocol.document(Source(1, data.data.documents[row].tolist())) for row in distractors]
    ends = np.cumsum([len(tokens) for tokens in wrapped])
    results = []
    with torch.no_grad(), _evaluating(model):
        extra = _encode(model, wrapped, budget, data.packing.chunk_size, device) if wrapped else None
        starts = [pack.to(device) for pack in packs]
        encoded = [model.encode(pack.documents) for pack in starts]
        for factor in factors:
            added = int(np.searchsorted(ends, budget * (factor - 1), side="right"))
            if factor > 1 and (not len(ends) or budget * (factor - 1) > ends[-1]):
                continue
            recall, bm25 = [], []
            for pack, own in zip(starts, encoded, strict=True):
                memory = own if extra is None or added == 0 else DocumentMemory.join([own, extra.first(added)])
                ids = (*pack.document_ids, *(texts.document_ids[row] for row in distractors[:added]))
                positive = torch.zeros(pack.queries, len(ids), dtype=torch.bool)
                positive[:, : len(pack.document_ids)] = pack.positive_QD.cpu()
                score_QD = model.read(pack.contexts, memory).doc_score_LQD.mean(0).cpu()
                recall.append(retrieval_scores(score_QD, positive, k)["recall@1"])
                bm25.append(retrieval_scores(texts.bm25(pack.query_ids, ids), positive, k)["recall@1"])
            tokens = int(starts[0].documents.tokens_T.numel() + (ends[added - 1] if added else 0))
            results.append(
                LengthResult(factor, len(starts[0].document_ids) + added, tokens, torch.cat(recall), torch.cat(bm25))
            )
    return results


def bootstrap_interval(values: Tensor, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of a mean.

    Args:
        values: One per query.
        draws: Resamples.
        seed: Of the resampling alone; no global generator is touched.
    """
    sample = values.double().numpy()
    rng = np.random.default_rng(seed)
    means = sample[rng.integers(len(sample), size=(draws, len(sample)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


class _Texts:
    def __init__(self, data: TokenizedCorpus) -> None:
        corpus = data.corpus
        self.document_ids = corpus.document_ids
        self._documents = dict(zip(corpus.document_ids, corpus.documents, strict=True))
        self._queries = dict(zip(corpus.query_ids, corpus.queries, strict=True))

    def bm25(self, query_ids: Sequence[str], document_ids: Sequence[str]) -> Tensor:
        """BM25 scores [Q, D], with bm25s' own tokenizer and defaults."""
        documents = bm25s.tokenize([self._documents[name] for name in document_ids], show_progress=False)
        queries = bm25s.tokenize([self._queries[name] for name in query_ids], show_progress=False, return_ids=False)
        if not documents.vocab:  # nothing but stop words, or a script that the tokenizer does not know
            return torch.zeros(len(query_ids), len(document_ids))
        index = bm25s.BM25()
        index.index(documents, show_progress=False)
        return torch.from_numpy(np.stack([index.get_scores(words) for words in queries]))


class _evaluating:
    """Evaluation mode for a while."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.was_training = self.model.training
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.was_training)


def _distractors(data: PackedMemory, packs: Sequence[MemoryPack], tokens: int) -> list[int]:
    assert data.data is not None
    corpus = data.data.corpus
    row = {name: number for number, name in enumerate(corpus.query_ids)}
    place = {name: number for number, name in enumerate(corpus.document_ids)}
    positives = corpus.positives()
    taken = {place[name] for pack in packs for name in pack.document_ids}
    taken |= {document for pack in packs for name in pack.query_ids for document in positives[row[name]]}
    order = np.random.default_rng(0).permutation(len(corpus.documents)).tolist()
    chosen, total = [], 0
    for document in order:
        if total >= tokens:
            break
        if document not in taken:
            chosen.append(document)
            total += len(data.data.documents[document])
    return chosen


def _encode(
    model: MemorySparseModel, documents: list[list[int]], budget: int, chunk_size: int, device: torch.device
) -> DocumentMemory:
    return DocumentMemory.join(
        [model.encode(Documents.build(batch, chunk_size).to(device)) for batch in _batches(documents, budget)]
    )


def _batches(documents: list[list[int]], budget: int) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    used = 0
    for tokens in documents:
        if batch and used + len(tokens) > budget:
            yield batch
            batch, used = [], 0
        batch.append(tokens)
        used += len(tokens)
    if batch:
        yield batch
