"""Pace: how long a method will take for longer memories, from how long it took for shorter ones.

Preparing (encoding what memories share) takes as long as its tokens; asking grows as it was seen to grow, and before
that as the method says. What is foreseen too short costs little, since a cell that runs late ends early.
"""

from __future__ import annotations

import math

from msa_train.evaluation.task import Task

STEEPEST = 2.0  # nothing here grows faster than attention to everything


class Pace:
    """Of one method.

    Args:
        growth: Its time for asking grows as this power of the memory's length, as far as nothing else is known.
    """

    def __init__(self, growth: float) -> None:
        self.growth = growth
        self._prepared: dict[str, tuple[int, float]] = {}  # of every pool: tokens, and seconds that they took
        self._asked: dict[str, list[tuple[int, float]]] = {}  # of every task: length and seconds of its cells

    def needed(self, task: Task, length: int) -> float:
        """Seconds that a cell will take; 0 where nothing is known.

        Args:
            task: The task.
            length: Tokens of its memories.
        """
        tokens, preparing = self._prepared.get(task.pool_name, (0, 0.0))
        seconds = max(length - tokens, 0) * preparing / tokens if tokens else 0.0
        before = self._asked.get(task.name, [])
        if before:
            last, took = before[-1]
            seconds += took * (length / last) ** self._power(before)
        return seconds

    def took(self, task: Task, length: int, preparing: float, asking: float) -> None:
        """Learns from a cell.

        Args:
            task: The task.
            length: Tokens of its memories.
            preparing: Seconds.
            asking: Seconds, for all questions.
        """
        tokens, before = self._prepared.get(task.pool_name, (0, 0.0))
        self._prepared[task.pool_name] = max(length, tokens), before + preparing
        self._asked.setdefault(task.name, []).append((length, asking))

    def _power(self, before: list[tuple[int, float]]) -> float:
        if len(before) < 2 or min(before[-2][1], before[-1][1]) <= 0:
            return self.growth
        (short, quick), (long, slow) = before[-2:]
        return min(max(math.log(slow / quick) / math.log(long / short), 0.0), STEEPEST)
