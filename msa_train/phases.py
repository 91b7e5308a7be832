"""Phases: what a run optimises, step by step (paper, section 3.3: warm-up, then the main part).

A phase is a pure function of the step, so resuming needs nothing but the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from msa_train.errors import UserError

Trainable = Literal["all", "routers"]
Schedule = Literal["constant", "linear", "cosine"]
Group = Literal["backbone", "routers"]


@dataclass(frozen=True)
class Phase:
    """One part of a run.

    Args:
        name: What logs call it.
        steps: Optimiser steps.
        lm_weight: Weight of the language-model loss.
        routing_weight: Weight of the routing loss.
        backbone_lr: Learning rate of the backbone.
        router_lr: Learning rate of the router projectors.
        schedule: How the rates fall over the phase, from all of it to `end_factor` of it.
        end_factor: Share of the rates that is left at the phase's end.
        warmup_steps: Steps over which the rates rise from 0 first.
        top_k: Documents to select during the phase, where it differs from model.msa.top_k; 0 for no difference.
        trainable: `all`, or `routers`: the backbone then has no gradient and nothing runs backward through it.
    """

    name: str
    steps: int
    lm_weight: float = 1.0
    routing_weight: float = 0.1
    backbone_lr: float = 1e-4
    router_lr: float = 1e-3
    schedule: Schedule = "cosine"
    end_factor: float = 0.1
    warmup_steps: int = 0
    top_k: int = 0
    trainable: Trainable = "all"

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {getattr(self, name)}: give {need}"
            for name, need, good in (
                ("steps", "at least 1", self.steps >= 1),
                ("lm_weight", "0 or more", self.lm_weight >= 0),
                ("routing_weight", "0 or more", self.routing_weight >= 0),
                ("backbone_lr", "0 or more", self.backbone_lr >= 0),
                ("router_lr", "0 or more", self.router_lr >= 0),
                ("end_factor", "a share between 0 and 1", 0 <= self.end_factor <= 1),
                ("warmup_steps", "fewer than steps", 0 <= self.warmup_steps < max(self.steps, 1)),
                ("top_k", "0 or more", self.top_k >= 0),
            )
            if not good
        ]
        if wrong:
            raise UserError(f"model.phases, phase '{self.name}': " + "; ".join(wrong))

    def learning_rate(self, step: int, group: Group) -> float:
        """Rate at a step of the phase, from 0.

        >>> phase = Phase("main", steps=5, router_lr=1.0, schedule="linear", end_factor=0.5, warmup_steps=1)
        >>> [phase.learning_rate(step, "routers") for step in range(5)]
        [1.0, 1.0, 0.875, 0.75, 0.625]
        """
        peak = self.router_lr if group == "routers" else self.backbone_lr
        if group == "backbone" and self.trainable == "routers":
            return 0.0
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        done = min((step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 1.0)
        falling = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]
        return peak * (self.end_factor + (1 - self.end_factor) * falling) if self.schedule != "constant" else peak


@dataclass(frozen=True)
class Timeline:
    """Phases one after the other; the last one goes on for ever."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        if not self.phases:
            raise UserError("model.phases is empty: a run needs at least one phase")

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return sum(phase.steps for phase in self.phases)

    @property
    def freezes_for_a_while(self) -> bool:
        """Whether some phases train the backbone and some do not."""
        return len({phase.trainable for phase in self.phases}) > 1

    def at(self, step: int) -> tuple[int, Phase, int]:
        """Number of the phase that a step falls into, the phase, and the step within it."""
        for number, phase in enumerate(self.phases):
            if step < phase.steps or number == len(self.phases) - 1:
                return number, phase, step
            step -= phase.steps
        raise AssertionError("unreachable: there is a last phase")

    def learning_rate(self, step: int, group: Group) -> float:
        """Rate of a parameter group at a step of the run."""
        _, phase, within = self.at(step)
        return phase.learning_rate(within, group)
