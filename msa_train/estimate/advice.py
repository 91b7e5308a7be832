"""Advice: the longest pack that fits, and what to change where a run does not fit or leaves room.

The invariant: whatever is advised was estimated, and fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args

from msa_train.estimate.peak import peak
from msa_train.estimate.seconds import step_time
from msa_train.estimate.sizes import CARDS, GIB, Card, Model, Pack, Setup
from msa_train.model import Recompute

SPARE = 0.06  # of the card's memory: CUDA's own, and gaps between blocks; where 76 GiB are foreseen, 80 GiB were full
WAYS: tuple[Recompute, ...] = get_args(Recompute)
LONGEST = 1 << 26  # document tokens that the search for the longest context ends at


def room(card: Card) -> float:
    """Bytes of a card that a run may fill."""
    return card.gib * GIB * (1 - SPARE)


def fits(model: Model, pack: Pack, setup: Setup, card: Card) -> bool:
    """Whether the peak leaves what CUDA itself and gaps between blocks take."""
    return peak(model, pack, setup).total <= room(card)


def longest(model: Model, packed: Callable[[int], Pack], setup: Setup, card: Card) -> int:
    """The most document tokens of a pack that fit, in steps of 1,024; 0 where none do.

    Args:
        model: The model.
        packed: The pack of so many document tokens.
        setup: How it computes.
        card: The GPU.
    """
    low, high = 0, LONGEST // 1024
    while low < high:
        middle = (low + high + 1) // 2
        if fits(model, packed(1024 * middle), setup, card):
            low = middle
        else:
            high = middle - 1
    return 1024 * low


def recomputing(setup: Setup, way: Recompute, kept_layers: int = 0) -> Setup:
    """The same, recomputing in another way."""
    return replace(setup, recompute=way, kept_layers=kept_layers)


def ways(setup: Setup) -> tuple[Recompute, ...]:
    """How a run may recompute: under ZeRO-3 not by documents, whose parts differ between ranks in number."""
    return tuple(way for way in WAYS if way != "documents" or (setup.strategy, setup.stage) != ("zero", 3))


def advice(model: Model, packed: Callable[[int], Pack], tokens: int, setup: Setup, card: Card) -> list[str]:
    """What to change: of what fits the fastest, where the run does not; of what is faster the best, where it does.

    Args:
        model: The model.
        packed: The pack of so many document tokens.
        tokens: The run's.
        setup: How it computes.
        card: The GPU.
    """
    pack = packed(tokens)
    now = step_time(model, pack, setup, card).total
    inside = fits(model, pack, setup, card)
    found = {
        words: step_time(model, pack, other, card).total
        for words, other in _others(model, setup)
        if fits(model, pack, other, card)
    }
    told = []
    faster = {words: seconds for words, seconds in found.items() if not inside or seconds < 0.995 * now}
    if faster:
        words = min(faster, key=lambda words: faster[words])
        change = f"and saves {1 - faster[words] / now:.0%}" if inside else f"at {faster[words]:,.2f} s a step"
        told.append(f"{words} fits {change}")
    if not inside:
        for words, other in _heavier(setup):
            fitting = [way for way in (setup.recompute, "layers", "documents")
                       if way in ways(other) and fits(model, pack, recomputing(other, way), card)]  # fmt: skip
            if fitting:
                way = "" if fitting[0] == setup.recompute else f" with model.recompute {fitting[0]}"
                told.append(f"{words}{way} fits")
                break
        most = longest(model, packed, setup, card)
        if most:
            told.append(f"data.document_tokens {most} fits as it is")
        larger = [name for name, other in CARDS.items() if fits(model, pack, setup, other)]
        if larger:
            told.append(f"as it is it fits on {', '.join(larger)}")
        if not told:
            told.append("nothing here fits: take a smaller backbone, more GPUs, or fewer queries per pack")
    return told


def _others(model: Model, setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Other ways to recompute, by how they are asked for."""
    for way in ways(setup) if setup.trains_backbone else ():
        if way != setup.recompute:
            yield f"model.recompute {way}", recomputing(setup, way)
    if setup.trains_backbone:
        start = setup.kept_layers + 1 if setup.recompute == "layers" else 1
        ahead = "" if setup.recompute == "layers" else "model.recompute layers with "
        for kept in range(start, model.sizes.layers):
            yield f"{ahead}model.kept_layers {kept}", recomputing(setup, "layers", kept)


def _heavier(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """What shares more out, least first."""
    if setup.freezes:
        return
    stage = setup.stage if setup.strategy == "zero" else 1
    for more in range(stage, 4):
        for host in (False, True):
            other = replace(
                setup,
                precision="bf16-true",
                strategy="zero",
                stage=more,
                offload_optimizer=host,
                offload_parameters=host and more == 3,
            )
            if other != setup and (setup.ranks > 1 or host) and not (more == 1 and host):
                file = f"zero{more}_offload" if host else f"zero{more}"
                yield f"configs/strategy/{file}.yaml", other
