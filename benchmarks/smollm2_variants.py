"""The variants of benchmarks/smollm2_memory.py: what each has in the place of the recipe's, as words and as configs.

Each differs in one thing, so that what comes out differs for one reason; all but two have the same seed. Baselines
stand among them, since no training changes what they score: they are asked once, and not after every run. Words follow
behind all configs. Phases and the curriculum, which grow and shrink with the run, are a config of their own, the last
one. The invariant: at a factor of 1 it says what the configs before it say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

LOGGED = 10  # steps from one log to the next; what is saved or validated in between has no row of its own
FULL_LR = 2.0e-4  # of the backbone's own weights; adapters learn at five times that
Phases = list[dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """What differs from the recipe.

    Args:
        fit: Further words of `msa-train fit`.
        phases: Its phases, by those of the recipe.
        seed: Of the routers' start and of the packs.
        killed: Killed half-way, and resumed.
        over: Whose weights are evaluated; its own if it is trained.
        ask: How questions are answered.
        alike: All layers weigh alike where documents are ranked, not by their recall in the last validation.
        baseline: Who is asked in the model's place; nothing is trained for it.
    """

    fit: tuple[str, ...] = ()
    phases: Callable[[Phases], Phases] = list
    seed: int = 0
    killed: bool = False
    over: str | None = None
    ask: Mapping[str, Any] = field(default_factory=dict)
    alike: bool = False
    baseline: str | None = None

    @property
    def trained(self) -> bool:
        """Whether it has weights of its own."""
        return self.over is None and self.baseline is None


def _at_the_backbones_rate(phases: Phases) -> Phases:
    return [{**phase, "backbone_lr": FULL_LR} for phase in phases]


def _without_warm_up(phases: Phases) -> Phases:
    """The main phase takes the steps of the warm-up too, and the steps in which the rates rise."""
    first, *_, main = phases
    steps = sum(phase["steps"] for phase in phases)
    return [{**main, "steps": steps, "warmup_steps": first.get("warmup_steps", 0)}]


def _layers(first: int, stop: int) -> tuple[str, str]:
    return "--model.msa.routed_layers", json.dumps(list(range(first, stop)))


VARIANTS = {
    "seed0": Variant(killed=True),
    "seed1": Variant(seed=1),
    "seed2": Variant(seed=2),
    "untrained": Variant(baseline="untrained"),
    "bm25": Variant(baseline="bm25"),
    "dense": Variant(baseline="dense"),
    "full_attention": Variant(baseline="full_attention_beyond"),
    "full": Variant(("--model.lora", "null"), _at_the_backbones_rate),
    "no_warm_up": Variant(phases=_without_warm_up),
    "only_8k": Variant(("--data.document_tokens", "8192")),
    "random_start": Variant(("--model.msa.router_init", "random")),
    "queries_1": Variant(("--data.queries_per_pack", "1")),
    "queries_16": Variant(("--data.queries_per_pack", "16")),
    "queries_64": Variant(("--data.queries_per_pack", "64")),
    "coupled": Variant(("--model.routing_loss", "coupled")),
    "focal": Variant(("--model.routing_loss", "focal")),
    "temperature_0.1": Variant(("--model.temperature", "0.1")),
    "temperature_0.05": Variant(("--model.temperature", "0.05")),
    "layers_all": Variant(_layers(0, 30)),
    "layers_upper_third": Variant(_layers(20, 30)),
    "layers_middle": Variant(_layers(10, 20)),
    "chunk_32": Variant(("--model.msa.chunk_size", "32")),
    "chunk_128": Variant(("--model.msa.chunk_size", "128")),
    "prompt_words": Variant(("--model.routing_words", "prompt")),
    "no_distractors": Variant(("--data.distractors", "0")),
    "no_mined": Variant(("--data.negatives", "null")),
    "generative": Variant(over="seed0", ask={"mode": "generative"}),
    "documents_1": Variant(over="seed0", ask={"documents": 1}),
    "documents_16": Variant(over="seed0", ask={"documents": 16}),
    "margin_0.1": Variant(over="seed0", ask={"margin": 0.1}),
    "margin_0.2": Variant(over="seed0", ask={"margin": 0.2}),
    "no_original_text": Variant(over="seed0", ask={"original_text": False}),
    "equal_layers": Variant(over="seed0", alike=True),
}
SEEDS = ("seed0", "seed1", "seed2")
GROUPS = {
    "headline": SEEDS[:1],
    "seeds": SEEDS[1:],
    "baselines": tuple(name for name, variant in VARIANTS.items() if variant.baseline),
    "ablations": tuple(name for name, variant in VARIANTS.items() if name not in SEEDS and not variant.baseline),
    "evaluations": tuple(name for name, variant in VARIANTS.items() if variant.over),
}


def chosen(only: Sequence[str]) -> list[str]:
    """Names of variants, in their order, by names of theirs and of groups; all by none."""
    wanted = {name for one in only for name in GROUPS.get(one, (one,))}
    return [name for name in VARIANTS if name in wanted or not only]


# --- configs ----------------------------------------------------------------------------------------------------


def overlay(
    configs: Sequence[Path], variant: Variant, factor: float = 1.0, minutes: float | None = None
) -> dict[str, Any]:
    """A config for behind all others: phases and curriculum of a run that is `factor` times as long.

    Args:
        configs: The recipe and what comes behind it.
        variant: Which phases.
        factor: Of all steps. What is saved and validated every so many steps is so more often in a shorter run.
        minutes: Where the clock ends training.
    """
    files = [yaml.safe_load(file.read_text()) for file in configs]
    phases: Phases = []
    for given in _given(files, "model", "phases"):  # as msa-train merges lists
        alike = len(given) == len(phases)
        phases = [{**one, **other} for one, other in zip(phases, given, strict=True)] if alike else given
    scaled = []
    for phase in variant.phases(phases):
        steps = max(round(phase["steps"] * factor), 1)
        rise = min(round(phase.get("warmup_steps", 0) * factor), steps - 1)
        scaled.append({**phase, "steps": steps, "warmup_steps": rise})

    def sooner(steps: int) -> int:
        return steps if factor >= 1 or not steps else max(round(steps * factor / LOGGED), 1) * LOGGED

    tokens = _given(files, "data", "init_args", "document_tokens")[-1]
    curriculum = tokens if isinstance(tokens, int) else {round(at * factor): tokens[at] for at in sorted(tokens)}
    found: dict[str, Any] = {
        "model": {"phases": scaled},
        "data": {"class_path": "datamodules.PackedMemory", "init_args": {"document_tokens": curriculum}},
        "trainer": {"val_check_interval": sooner(_given(files, "trainer", "val_check_interval")[-1])},
        "checkpoint": {"every_n_train_steps": sooner(_given(files, "checkpoint", "every_n_train_steps")[-1])},
    }
    if minutes is not None:
        found["trainer"]["max_time"] = {"seconds": round(60 * minutes)}
    return found


def _given(files: Sequence[Any], *place: str) -> list[Any]:
    """What files say at a place, in their order."""
    found = []
    for value in files:
        for name in place:
            value = (value or {}).get(name)
        if value is not None:
            found.append(value)
    return found


def evaluation(file: Path, variant: Variant) -> dict[str, Any]:
    """The evaluation's config, as a variant has it.

    Raises:
        SystemExit: It is none.
    """
    config = yaml.safe_load(file.read_text())
    found = _callbacks(config)
    if len(found) != 1:
        raise SystemExit(f"{file}: give one callbacks.ExtrapolationEvaluation in trainer.callbacks")
    asked = found[0]
    asked["ask"] = {**asked.get("ask", {}), **variant.ask}
    asked |= {"router": variant.baseline is None, "baselines": [variant.baseline] if variant.baseline else []}
    return config


def tasks_of(config: dict[str, Any]) -> list[str]:
    """What an evaluation asks: its tasks by their names; needles, which have a mean, as one."""
    (asked,) = _callbacks(config)
    kinds = [(task["class_path"].rpartition(".")[2], task.get("init_args", {})) for task in asked["tasks"]]
    return list(dict.fromkeys(kind if kind == "NeedleTask" else given.get("name", kind) for kind, given in kinds))


def _callbacks(config: dict[str, Any]) -> list[dict[str, Any]]:
    (callbacks,) = _given([config], "trainer", "callbacks") or [[]]
    return [one["init_args"] for one in callbacks if one["class_path"].endswith("ExtrapolationEvaluation")]
