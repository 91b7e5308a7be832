"""Scores of an evaluation, each from 0 to 1, and means with their intervals.

A score is of one question; a mean always comes with its 95% bootstrap interval and the number of questions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torchmetrics.functional.text import squad

RANKED = 10  # documents that MRR and NDCG look at, as BEIR does


@dataclass(frozen=True)
class Mean:
    """A mean over questions.

    Args:
        value: The mean.
        low: Lower end of its 95% bootstrap interval.
        high: Upper end.
        n: Questions.
    """

    value: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(values: Sequence[float], draws: int = 2000, seed: int = 0) -> Mean:
        """The mean of scores.

        Args:
            values: One per question.
            draws: Resamples.
            seed: Of the resampling alone; no global generator is touched.

        >>> Mean.of([1.0, 1.0, 1.0])
        Mean(value=1.0, low=1.0, high=1.0, n=3)
        """
        return Mean.over([values], draws, seed)

    @staticmethod
    def over(samples: Sequence[Sequence[float]], draws: int = 2000, seed: int = 0) -> Mean:
        """The plain mean of several tasks' means, however many questions each has; `n` counts all questions.

        Args:
            samples: Scores of every task, one per question. Questions are resampled within their task.
            draws: Resamples.
            seed: Of the resampling alone; no global generator is touched.

        >>> Mean.over([[1.0, 1.0], [0.0]])
        Mean(value=0.5, low=0.5, high=0.5, n=3)
        """
        generator = np.random.default_rng(seed)
        means = []
        for scores in samples:
            task = np.asarray(scores, np.float64)
            drawn = [task[generator.integers(len(task), size=len(task))].mean() for _ in range(draws)]
            means.append([task.mean(), *drawn])
        value, *resampled = np.mean(means, axis=0)
        low, high = np.quantile(resampled, [0.025, 0.975])
        return Mean(float(value), float(low), float(high), sum(map(len, samples)))

    def told(self) -> str:
        """As a table has it.

        >>> Mean(0.75, 0.5, 1.0, 8).told()
        '0.750 [0.50, 1.00] n=8'
        """
        return f"{self.value:.3f} [{self.low:.2f}, {self.high:.2f}] n={self.n}"


def ranking_scores(ranked: Sequence[int], gold: Iterable[int], k: int) -> dict[str, float]:
    """Recall@1 and @k, MRR@10 and NDCG@10 of a ranking, best document first.

    Recall's denominator is min(gold documents, cutoff), so that a perfect ranking scores 1.

    Args:
        ranked: The best documents; at least max(k, 10), or all there are.
        gold: The right ones, at least one.
        k: Cutoff of recall@k.

    >>> {name: round(score, 3) for name, score in ranking_scores([7, 3, 9], [3], 2).items()}
    {'recall@1': 0.0, 'recall@k': 1.0, 'mrr@10': 0.5, 'ndcg@10': 0.631}
    """
    wanted = set(gold)
    hits = [number in wanted for number in ranked]
    places = [place for place, hit in enumerate(hits[:RANKED]) if hit]
    ideal = sum(1 / math.log2(place + 2) for place in range(min(len(wanted), RANKED)))
    return {
        "recall@1": float(any(hits[:1])),
        "recall@k": sum(hits[:k]) / min(len(wanted), k),
        f"mrr@{RANKED}": 1 / (1 + places[0]) if places else 0.0,
        f"ndcg@{RANKED}": sum(1 / math.log2(place + 2) for place in places) / ideal,
    }


def found_share(documents: Iterable[int], gold: Iterable[int]) -> float:
    """Share of the gold documents that are among these: whether a wrong answer is the router's fault or the reader's.

    >>> found_share([4, 9], [9, 2])
    0.5
    """
    wanted = set(gold)
    return len(wanted.intersection(documents)) / len(wanted)


def containment(answer: str, wanted: Sequence[str]) -> float:
    """Share of the wanted strings that occur in an answer, in any case (RULER's string_match_all).

    >>> containment("It is 12 and 34.", ["12", "34", "56", "it"])
    0.75
    """
    cleaned = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()
    return sum(string.lower() in cleaned for string in wanted) / len(wanted)


def degradation(first: float, last: float) -> float | None:
    """What is lost from the shortest memory to the longest, in percent of the former; None where that is 0.

    >>> degradation(4.0, 3.0), degradation(0.0, 0.0)
    (25.0, None)
    """
    return 100 * (first - last) / first if first else None


def answer_scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """Exact match and token F1 with the nearest reference, as SQuAD defines them: in lower case, without articles and
    punctuation.

    >>> answer_scores("The by-river 4", ["by river 4", "byriver four"])
    {'exact_match': 0.0, 'f1': 0.5}
    """
    if not answer.strip():  # right it would be wherever nothing is left of a reference, like "A"
        return {"exact_match": 0.0, "f1": 0.0}
    found = squad(
        [{"prediction_text": answer, "id": "0"}],
        [{"answers": {"answer_start": [0] * len(references), "text": list(references)}, "id": "0"}],
    )
    return {"exact_match": float(found["exact_match"]) / 100, "f1": float(found["f1"]) / 100}
