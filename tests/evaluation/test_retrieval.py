"""What every retriever keeps to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.lexical import BM25Retriever
from msa_train.evaluation.retrieval import Retriever, best_places


def slow_best(scores: list[float], k: int) -> list[int]:
    """The best of those left, the lowest place first, k times."""
    left = list(range(len(scores)))
    found = []
    while left and len(found) < k:
        best = max(scores[place] for place in left)
        found.append(next(place for place in left if scores[place] == best))
        left.remove(found[-1])
    return found


@given(st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.25, 3.0]), max_size=40), st.integers(0, 50))
def test_the_best_places_are_those_of_a_slow_search(scores: list[float], k: int) -> None:
    found = best_places(np.array(scores, np.float32), k)
    assert found == slow_best(scores, k) and all(type(place) is int for place in found)


@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_bm25_is_a_retriever(k: int) -> None:
    retriever: Retriever = BM25Retriever()
    index = retriever.index(["a heron", "an otter", "heron, heron", "a heron"])
    assert retriever.name == "BM25"
    assert index.best("Where is the heron?", k) == [2, 0, 3, 1][:k]
