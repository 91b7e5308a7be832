"""Phases are pure functions of the step."""

from __future__ import annotations

import pytest

from msa_train.errors import UserError
from msa_train.phases import Phase, Timeline


def test_steps_fall_into_their_phase() -> None:
    timeline = Timeline((Phase("warm-up", 3), Phase("main", 2)))
    assert timeline.steps == 5
    assert [(timeline.at(s)[0], timeline.at(s)[2]) for s in range(7)] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3),
    ]  # fmt: skip


def test_rates_rise_then_fall_to_their_share() -> None:
    phase = Phase("main", steps=10, backbone_lr=2.0, router_lr=4.0, warmup_steps=2, end_factor=0.5, schedule="cosine")
    rates = [phase.learning_rate(step, "backbone") for step in range(11)]
    assert rates[0] == 1.0 and rates[2] == 2.0 and abs(rates[10] - 1.0) < 1e-9
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert phase.learning_rate(2, "routers") == 4.0


def test_a_frozen_backbone_has_no_rate() -> None:
    assert Phase("r", steps=2, trainable="routers").learning_rate(0, "backbone") == 0


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"lm_weight": -1.0}, {"end_factor": 2.0}, {"warmup_steps": 5}, {"top_k": -1}]
)
def test_nonsense_is_named(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Phase("p", **{"steps": 5, **wrong})  # type: ignore[arg-type]


def test_no_phase_is_an_error() -> None:
    with pytest.raises(UserError, match="at least one"):
        Timeline(())
