"""The doctor: everything that can be known of a run before a GPU is rented for it.

It looks at the configuration, builds the model on no device, and asks the data module. Nothing is trained, and no
weight is read but those of a checkpoint to start from. The invariant: a run that the doctor lets pass does not fail
for what the configuration, the data or the installation say.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from msa_train.backbone import open_config
from msa_train.checkpoints import check_resumable
from msa_train.findings import Finding, attempt
from msa_train.module import COPIES, MemorySparseModule
from msa_train.source import PackSource
from msa_train.strategies import INSTALL, PRECISIONS, zero_arguments

MALICIOUS = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
SHOWN = ("torch", "transformers", "lightning", "datasets", "deepspeed")


def examine(
    model: MemorySparseModule,
    data: PackSource,
    config: Any,
    start: Callable[[], Path | None],
    callbacks: Sequence[Any] = (),
) -> list[Finding]:
    """All findings.

    Args:
        model: The module, not built.
        data: The data module, not set up.
        config: The run's configuration: its `trainer` and `checkpoint` settings by name.
        start: Finds the checkpoint to resume from; None for a run that starts anew.
        callbacks: The run's callbacks; one that has `examine(data)` is asked.
    """
    trainer = config.trainer
    ranks = world_size(trainer)
    accumulated, steps = trainer.accumulate_grad_batches, trainer.max_steps
    findings = list(_installation(trainer))
    found = attempt("data", "corpus", lambda: data.examine(data.packs_at_once(ranks) * accumulated, steps))
    tokens = None if any(finding.level == "error" for finding in found) else len(data.tokenizer)
    longest = 0 if tokens is None else data.longest()
    findings += attempt("model", "backbone", lambda: list(_model(model, tokens, longest)))
    findings += found
    findings += attempt(
        "run", "start", lambda: list(_start(model, tokens, start(), data.packs_at_once(ranks) * accumulated))
    )
    findings += _schedule(model, trainer, config.checkpoint.every_n_train_steps)
    findings += _strategy(model, trainer, ranks)
    for callback in callbacks:
        name = type(callback).__name__
        look = getattr(callback, "examine", lambda data, name=name: [Finding("run", "callback", name)])
        findings += attempt("run", name, lambda look=look: look(data))  # type: ignore[misc]
    return findings


def world_size(trainer: Any) -> int:
    """Ranks that a trainer's settings ask for; 1 where they leave it to the machine."""
    devices = trainer.devices
    if isinstance(devices, str):
        devices = [part for part in devices.split(",") if part] if "," in devices else devices
        if isinstance(devices, str):
            devices = int(devices) if devices.lstrip("-").isdigit() else 1
    count = len(devices) if isinstance(devices, list) else int(devices)
    return max(count, 1) * int(trainer.num_nodes)


def _installation(trainer: Any) -> Iterator[Finding]:
    versions = {name: _version(name) for name in SHOWN}
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield Finding("installation", "versions", known)
    for name, refused in MALICIOUS.items():
        if _version(name) in refused:
            yield Finding(
                "installation", name, f"{_version(name)} is a malicious release that steals credentials", "error",
                "pip install 'lightning>=2.6.4', and change every secret that this machine could read",
            )  # fmt: skip
    if zero_arguments(trainer.strategy) is not None and importlib.util.find_spec("deepspeed") is None:
        yield Finding(
            "installation", "deepspeed", "trainer.strategy asks for it, and it is not installed", "error", INSTALL
        )  # fmt: skip


def _model(model: MemorySparseModule, tokens: int | None, longest: int) -> Iterator[Finding]:
    net = model.blueprint.blank(tokens)
    config = net.backbone.config
    routers = sum(weight.numel() for _, weight in net.router_parameters())
    backbone = sum(weight.numel() for _, weight in net.backbone_parameters())
    freed = sum(weight.numel() for _, weight in net.backbone_parameters() if weight.requires_grad)  # adapters, if any
    layers = net.routed_layers
    name = model.blueprint.backbone
    yield Finding("model", "backbone", f"{name}: {config.model_type}, {backbone / 1e6:,.1f}M weights")
    yield Finding("model", "routers", f"layers {layers[0]}..{layers[-1]}, {routers / 1e6:,.1f}M weights")
    for phase in model.timeline.phases:
        trained = routers + (freed if phase.trainable == "all" else 0)
        yield Finding(
            "model", f"phase '{phase.name}'",
            f"{phase.steps:,} steps train {trained / 1e6:,.1f}M weights ({phase.trainable}); "
            f"loss {phase.lm_weight:g} lm + {phase.routing_weight:g} routing",
        )  # fmt: skip
    if tokens is not None:
        asked = open_config(model.blueprint.backbone).vocab_size
        grown = tokens > asked
        yield Finding(
            "model", "vocabulary",
            f"{asked:,} rows for {tokens:,} tokens" + (": embeddings grow, the new rows untrained" if grown else ""),
        )  # fmt: skip
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest + model.msa.top_k > positions:
        yield Finding(
            "model", "positions", f"{longest:,} tokens in one document or context; the backbone knows {positions:,}",
            "error", "lower data.max_document_tokens, data.answer_share or the documents per step",
        )  # fmt: skip
    elif positions is not None and longest:
        yield Finding("model", "positions", f"{positions:,}; the longest document or context has {longest:,} tokens")
    yield Finding(
        "model", "loss", "in chunks, over labelled tokens alone, by the head's own call: gathered as ZeRO-3 needs it"
    )


def _start(
    model: MemorySparseModule, tokens: int | None, checkpoint: Path | None, packs_per_step: int
) -> Iterator[Finding]:
    model.preflight(tokens, checkpoint)
    if checkpoint is not None:
        check_resumable(checkpoint, packs_per_step)
        yield Finding("run", "start", f"goes on from {checkpoint}: names and shapes fit")
    elif model.init_from is not None:
        yield Finding("run", "start", f"step 0, with the weights of {model.init_from}: names and shapes fit")
    else:
        yield Finding("run", "start", "step 0, in an empty folder")


def _schedule(model: MemorySparseModule, trainer: Any, checkpoint_every: int | None) -> Iterator[Finding]:
    steps, planned = trainer.max_steps, model.timeline.steps
    yield Finding("run", "length", f"{steps:,} steps of {planned:,} in the phases")
    if steps != planned:
        yield Finding(
            "run", "phases", f"trainer.max_steps {steps:,} is not the phases' {planned:,}", "warning",
            "the last phase is cut, or its final rate held; leave max_steps out to run the phases",
        )  # fmt: skip
    interval = trainer.val_check_interval
    batches = steps * trainer.accumulate_grad_batches
    if isinstance(interval, int) and interval > batches:
        yield Finding(
            "run", "validation", f"trainer.val_check_interval {interval:,}: never within {batches:,} packs", "warning",
            "lower it, or nothing watches the router on held-out queries",
        )  # fmt: skip
    if checkpoint_every:
        yield Finding("run", "checkpoints", f"every {checkpoint_every:,} steps")


def _strategy(model: MemorySparseModule, trainer: Any, ranks: int) -> Iterator[Finding]:
    name = _strategy_name(trainer)
    yield Finding("run", "ranks", f"{ranks} x {trainer.accelerator}, strategy {name}, precision {trainer.precision}")
    if str(trainer.devices) in ("auto", "-1"):
        yield Finding(
            "run", "devices", f"{trainer.devices}: as many as the machine has; counted as one here", "warning",
            "give trainer.devices a number, so that the batch is known",
        )  # fmt: skip
    mixed = model.timeline.freezes_for_a_while
    zero = zero_arguments(trainer.strategy)
    if zero is not None:
        yield from _zero_findings(model, zero, str(trainer.precision))
    elif "deepspeed" in name:
        yield Finding(
            "run", "strategy", f"{name} is Lightning's DeepSpeed, whose checkpoints this project does not open",
            "error", "--trainer.strategy msa_train.strategies.ZeRO (docs/scaling.md)",
        )  # fmt: skip
    ddp = name.startswith("ddp") or (name == "auto" and ranks > 1)
    if mixed and ddp and not _finds_unused(trainer.strategy):
        yield Finding(
            "run", "strategy", "the phases freeze the backbone for a while, which DDP takes for an error", "error",
            "--trainer.strategy ddp_find_unused_parameters_true",
        )  # fmt: skip
    lost = model.lost_updates(str(trainer.precision)) if zero is None else None
    if lost is not None:
        yield Finding("run", "weights", lost, "warning", COPIES)
    if model.blueprint.weights == "float32" and str(trainer.precision) == "bf16-true" and zero is None:
        yield Finding("run", "weights", "model.weights float32 is overruled by precision bf16-true", "warning",
                      "bf16-mixed keeps float32 weights")  # fmt: skip


def _zero_findings(model: MemorySparseModule, zero: Any, precision: str) -> Iterator[Finding]:
    stage = zero.get("stage", 2)
    shared = "optimiser" + ", gradients" * (stage > 1) + ", weights" * (stage > 2)
    host = " and ".join(
        word for key, word in (("offload_optimizer", "optimiser"), ("offload_parameters", "weights")) if zero.get(key)
    )
    told = f"stage {stage}: the ranks share {shared}" + (f"; {host} in the host's memory" if host else "")
    yield Finding("run", "ZeRO", told + "; bfloat16 weights with a float32 copy")
    if zero.get("offload_parameters") and stage != 3:
        yield Finding("run", "ZeRO", "offload_parameters without stage 3", "error", "take stage 3, or leave it out")
    if precision not in PRECISIONS:
        yield Finding("run", "precision", f"{precision}: ZeRO trains bfloat16 weights", "error",
                      "--trainer.precision bf16-true")  # fmt: skip
    if stage == 3 and model.blueprint.recompute == "documents":
        yield Finding("run", "strategy", "model.recompute documents under ZeRO stage 3: ranks would wait for ever",
                      "error", "take stage 2, or recompute layers")  # fmt: skip
    if model.timeline.freezes_for_a_while:
        yield Finding(
            "run", "strategy", "the phases freeze the backbone for a while, which ZeRO cannot", "error",
            "train the routers in a run of their own, and start the next from it with --model.init_from",
        )  # fmt: skip
    if model.blueprint.weights == "float32":
        yield Finding(
            "run", "weights", "model.weights float32 begin rounded to bfloat16, as ZeRO trains them", "warning",
            "model.weights bfloat16 says so",
        )  # fmt: skip


def _finds_unused(strategy: Any) -> bool:
    if isinstance(strategy, str):
        return "find_unused_parameters_true" in strategy
    return bool((strategy.get("init_args") or {}).get("find_unused_parameters")) if hasattr(strategy, "get") else False


def _strategy_name(trainer: Any) -> str:
    strategy = trainer.strategy
    if isinstance(strategy, str):
        return strategy
    path = strategy.get("class_path", "") if hasattr(strategy, "get") else type(strategy).__name__
    return str(path).rpartition(".")[2].lower()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
