"""Ranks: an evaluation on every rank of a job. All encode their share; the first asks, scores, decides and reports.

The invariant: every rank comes by the same collectives in the same order, whatever fails on the first one.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from msa_train.errors import UserError

Result = TypeVar("Result")
Item = TypeVar("Item")
CARRIED = (UserError, torch.OutOfMemoryError)  # what they mean, they mean on every rank
PATIENCE = timedelta(days=1)  # the others wait while the first one writes answers; training's own group keeps its limit


@dataclass(frozen=True)
class Ranks:
    """The ranks of an evaluation.

    Args:
        rank: This one.
        world: How many there are.
        group: How they talk, where there are several: over gloo, since what they say lies in host memory.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @staticmethod
    def here() -> Ranks:
        """Those of the current job. Collective."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return Ranks()
        return Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE))

    def close(self) -> None:
        """Lets the group go."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def told(self, value: Result) -> Result:
        """The first rank's value, on all of them."""
        if self.world == 1:
            return value
        message = [value]
        dist.broadcast_object_list(message, 0, self.group)
        return message[0]

    def anyone(self, value: Result) -> Result:
        """What any rank says, of several the first that says something: False and "" say nothing. Collective."""
        if self.world == 1:
            return value
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, self.group)
        return next(filter(None, values), value)

    def together(self, act: Callable[[], Result]) -> Result:
        """What `act` gives on this rank; what fails on one of them is raised on all.

        Raises:
            UserError: `act` raised one on some rank; torch.OutOfMemoryError likewise.
            RuntimeError: It raised something else on another rank.
        """
        if self.world == 1:
            return act()
        failure: Exception | None = None
        try:
            result = act()
        except Exception as error:  # told to all before it is raised
            failure = error
        failures: list[Any] = [None] * self.world
        kind = next((kind for kind in CARRIED if isinstance(failure, kind)), RuntimeError)
        told = failure and (kind, str(failure), "".join(traceback.format_exception(failure)))
        dist.all_gather_object(failures, told, self.group)
        if failure is not None:
            raise failure
        for rank, (kind, text, trace) in ((rank, told) for rank, told in enumerate(failures) if told):
            raise kind(f"rank {rank}: {trace}" if kind is RuntimeError else text)
        return result

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's part of a list: consecutive, and as large as the others' or one less."""
        return items[len(items) * self.rank // self.world : len(items) * (self.rank + 1) // self.world]
