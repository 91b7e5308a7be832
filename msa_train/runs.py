"""A run, opened again: the model that it trained, and how text goes in and out of it.

    config.yaml            sizes and words; plain data, of which a few values are read
    tokenizer/             the run's tokenizer
    backbone/config.json   the backbone's shape, its vocabulary grown to the tokenizer
    routing.json           recall@1 of every routed layer in the last validation, a mean over its splits
    step=N.ckpt/           weights, and what a resume needs (folders.py); last.ckpt points to the newest

What `msa-train export` makes of a run opens alike: a config.json that says it all, beside tokenizer and weights.
The invariant: the folder is enough. It may be moved, no corpus or backbone beside it is asked for, and no class that
config.yaml names is ever imported.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from msa_train.backbone import MEMORY, OURS, open_adapters, open_config, open_home, open_memory
from msa_train.checkpoints import (
    DTYPES,
    check_chunk_size,
    check_sound,
    find_checkpoint,
    read_checkpoint,
    restore,
    restore_exported,
)
from msa_train.config import MSAConfig, RouterInit
from msa_train.errors import UserError
from msa_train.folder_files import read_facts
from msa_train.folders import FACTS, WEIGHTS, checkpoints_of
from msa_train.kernels.choice import Kernels
from msa_train.lora import LoRA
from msa_train.model import MemorySparseModel
from msa_train.protocol import Protocol, RoutingWords

CONFIG, TOKENIZER, BACKBONE, RECALL = "config.yaml", "tokenizer", "backbone", "routing.json"
EXPORTED = "config.json"  # what tells an exported run's folder
TEMPERATURE = 0.1  # the paper's
DOCUMENT_TOKENS = 1024  # where the run's data has no limit of its own: that of datamodules.PackedMemory


@dataclass(frozen=True)
class Run:
    """A trained run.

    Args:
        folder: Where it lives.
        checkpoint: Whose weights these are.
        model: The trained model, in eval mode, on the CPU, without gradients.
        protocol: The run's tokenizer and words.
        layer_weights: Share of every routed layer in the score of a document, in order, 1 in all: by recall@1 in the
            last validation; alike where there was none, or none found anything.
        max_document_tokens: Longer documents were split at the ends of their sentences.
        temperature: Of the routing loss.
        lora: The adapters that it trained, if it says so; in the model, or merged into its weights.
    """

    folder: Path
    checkpoint: Path
    model: MemorySparseModel
    protocol: Protocol
    layer_weights: tuple[float, ...]
    max_document_tokens: int
    temperature: float = TEMPERATURE
    lora: LoRA | None = None


def open_run(name: str | Path, backbone: str | None = None, merged: bool = True) -> Run:
    """Opens a trained run.

    Args:
        name: A run's folder, of which the newest checkpoint is taken; or a checkpoint in one; or an exported folder,
            this project's or a published one.
        backbone: Where the backbone is, if that folder is of routers alone and it is not where they say.
        merged: Whether adapters are merged into the backbone's weights.

    Raises:
        UserError: It is no run, something of it is missing or damaged, or the checkpoint is of another architecture.
    """
    if (Path(name) / EXPORTED).is_file():
        return _open_exported(Path(name), backbone, merged)
    if backbone is not None:
        raise UserError(f"--backbone is for routers alone; '{name}' is a run, which has its backbone")
    folder, checkpoint = _find(Path(name))
    config = _Config(folder / CONFIG)
    msa = MSAConfig(
        chunk_size=config.whole("model.msa.chunk_size"),
        top_k=config.whole("model.msa.top_k"),
        routed_layers=config.wholes("model.msa.routed_layers"),
        router_init=config.choice("model.msa.router_init", get_args(RouterInit)),
    )
    dtype = DTYPES[config.choice("model.weights", tuple(DTYPES))]
    protocol = Protocol(
        _open_tokenizer(folder / TOKENIZER), config.choice("model.routing_words", get_args(RoutingWords))
    )
    saved = read_checkpoint(checkpoint)
    check_chunk_size(msa, saved, str(checkpoint))
    backbone = str(folder / BACKBONE / "config.json")
    _check_shape(backbone, msa)
    model = restore(backbone, msa, dtype, checkpoint, len(protocol.tokenizer), Kernels(), merged)
    return Run(
        folder=folder,
        checkpoint=checkpoint,
        model=model.eval().requires_grad_(False),
        protocol=protocol,
        layer_weights=layer_shares(read_recall(folder / RECALL, model.routed_layers)),
        max_document_tokens=config.whole("data.init_args.max_document_tokens", DOCUMENT_TOKENS),
        temperature=config.positive("model.temperature", TEMPERATURE),
        lora=LoRA.of(saved["msa_train"].get("lora"), str(checkpoint)),
    )


def frozen_backbone(name: str | Path, backbone: str | None = None) -> str:
    """The backbone of a run that trained routers alone, or adapters with them, as it was named in training.

    Args:
        name: As for `open_run`.
        backbone: Another name for it.

    Raises:
        UserError: It was trained too, its weights were random, or nobody says what it was.
    """
    if (Path(name) / EXPORTED).is_file():
        home = open_home(str(name))
        if backbone is None and home is None:
            raise UserError(
                f"{name}: an exported folder does not say what its backbone was: give the run's own, or --backbone"
            )
        return backbone or home.name  # type: ignore[union-attr]
    folder, checkpoint = _find(Path(name))
    config = _Config(folder / CONFIG)
    adapted = read_facts(checkpoint).get("lora") is not None  # the backbone's own weights then stay, whatever the phase
    for phase in config.mappings("model.phases"):
        if phase.get("trainable") != "routers" and not adapted:
            raise UserError(
                f"{name}: phase '{phase.get('name')}' trained the backbone too, so routers alone are not the run; "
                "export the whole, without --only"
            )
    named = backbone or config.text("model.backbone")
    if named.endswith(".json"):
        raise UserError(
            f"{name}: its backbone had random weights, of the shape in '{named}', which no one else has; export the "
            "whole, without --only"
        )
    try:
        home, beside = open_home(named), open_adapters(named)
    except UserError as error:
        raise UserError(f"{name}: {error}; say where it is with --backbone") from error
    if beside is not None:
        raise UserError(
            f"{name}: its backbone had the adapters of '{named}' merged into it, and routers alone do not have them; "
            "export the whole, without --only"
        )
    return named if home is None else home.name


def _open_exported(folder: Path, backbone: str | None, merged: bool) -> Run:
    """A folder that a run was exported to, or a published one, which keeps to the published protocol."""
    msa = open_memory(str(folder))
    if msa is None:
        raise UserError(
            f"{folder}: not a run of msa-train ({EXPORTED} has no {MEMORY}); give a run's folder, or one that "
            "`msa-train export` wrote"
        )
    config = _Config(folder / EXPORTED)
    protocol = Protocol(
        _open_tokenizer(folder), config.choice(f"{OURS}.routing_words", get_args(RoutingWords), "prompt")
    )
    _check_shape(str(folder), msa)
    model = restore_exported(str(folder), msa, backbone, merged)
    return Run(
        folder=folder,
        checkpoint=folder,
        model=model.eval().requires_grad_(False),
        protocol=protocol,
        layer_weights=layer_shares(read_recall(folder / RECALL, model.routed_layers)),
        max_document_tokens=config.whole(f"{OURS}.max_document_tokens", DOCUMENT_TOKENS),
        temperature=config.positive(f"{MEMORY}.infonce_loss_temp", TEMPERATURE),
        lora=open_adapters(str(folder)),
    )


def layer_shares(recall_L: Sequence[float]) -> tuple[float, ...]:
    """Recall of every layer as a share of their sum; equal shares where nothing was found.

    >>> layer_shares([0.5, 0.0, 1.5]), layer_shares([0.0, 0.0])
    ((0.25, 0.0, 0.75), (0.5, 0.5))
    """
    total = sum(recall_L)
    return tuple(recall / total for recall in recall_L) if total > 0 else (1 / len(recall_L),) * len(recall_L)


def save_recall(folder: Path, step: int, recall: Mapping[int, float]) -> None:
    """Keeps what a validation found in a run's folder.

    Args:
        folder: The run's.
        step: Step that was validated.
        recall: Recall@1 of every routed layer, by its number in the decoder.
    """
    aside = folder / f"{RECALL}.writing"
    aside.write_text(json.dumps({"step": step, "recall@1": {str(layer): recall[layer] for layer in recall}}) + "\n")
    aside.replace(folder / RECALL)


def read_recall(file: Path, layers: Sequence[int]) -> list[float]:
    """Recall@1 of every routed layer in a run's last validation, of its routing.json; zeros where there was none.

    Raises:
        UserError: The file is damaged.
    """
    if not file.is_file():
        return [0.0] * len(layers)
    try:
        recall_L = [float(json.loads(file.read_text())["recall@1"][str(layer)]) for layer in layers]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise UserError(f"{file}: not what a validation writes; delete it to have all layers weigh alike") from error
    if not all(0 <= recall <= 1 for recall in recall_L):
        raise UserError(f"{file}: a recall outside 0 to 1; delete it to have all layers weigh alike")
    return recall_L


def _find(path: Path) -> tuple[Path, Path]:
    """A run's folder and the checkpoint to take."""
    if not path.exists():
        raise UserError(f"no run '{path}': give a run's folder, like checkpoints/quickstart, or a checkpoint in one")
    is_run = path.is_dir() and not (path / FACTS).is_file()  # checkpoints are folders too
    folder = path if is_run else path.parent
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: not a run of msa-train (no {CONFIG}); give the folder that `msa-train fit` wrote")
    for part in (f"{TOKENIZER}/tokenizer_config.json", f"{BACKBONE}/config.json"):
        if not (folder / part).is_file():
            raise UserError(
                f"{folder}: no {part}, as in runs of older versions; resume it once "
                f"(msa-train fit --config {folder / CONFIG} --ckpt_path last), or train it anew"
            )
    if not is_run:
        check_sound(path, (WEIGHTS, FACTS))
        return folder, path
    checkpoint = find_checkpoint(folder, "last", warnings.warn, (WEIGHTS, FACTS)) if checkpoints_of(folder) else None
    if checkpoint is None:
        raise UserError(f"{folder}: no whole checkpoint (step=N.ckpt) yet; let msa-train fit run until it saves one")
    return folder, checkpoint


def _check_shape(backbone: str, msa: MSAConfig) -> None:
    """Builds a model on no device, which costs nothing, before one is built and filled."""
    config = open_config(backbone)
    try:
        with torch.device("meta"):
            MemorySparseModel(AutoModelForCausalLM.from_config(config), msa)
    except UserError:
        raise
    except Exception as error:  # of sizes that do not fit one another the libraries below raise whatever they meet
        reason = str(error).strip().partition("\n")[0][:120]
        raise UserError(
            f"{backbone}: no model can be made of it ({type(error).__name__}: {reason}); restore its config.json"
        ) from error


def _open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of a damaged file the libraries below raise whatever they stumble over
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{folder}: not a readable tokenizer ({reason}); resume the run once, which saves it anew"
        ) from error


class _Config:
    """A run's config.yaml as plain data: what is read of it is checked, and nothing is made of it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except Exception as error:  # PyYAML raises far more than its own errors
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"{file}: not readable YAML ({reason!a}); correct it, or resume the run once with its own configs, "
                "which writes it anew"
            ) from error

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number from 1."""
        return self._value(
            key, lambda value: type(value) is int and 0 < value < 2**31, "a whole number from 1", default
        )

    def wholes(self, key: str) -> tuple[int, ...]:
        """Whole numbers."""
        numbers = self._value(
            key, lambda value: isinstance(value, list) and all(type(n) is int for n in value), "a list of whole numbers"
        )
        return tuple(numbers)

    def mappings(self, key: str) -> list[dict[str, Any]]:
        """Mappings, at least one."""
        return self._value(
            key,
            lambda value: isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value),
            "a list of mappings",
        )

    def text(self, key: str) -> str:
        """Some words."""
        return self._value(key, lambda value: isinstance(value, str), "a text")

    def choice(self, key: str, choices: tuple[Any, ...], default: str | None = None) -> Any:
        """One of a few words."""
        return self._value(key, lambda value: value in choices, f"one of {', '.join(choices)}", default)

    def positive(self, key: str, default: float) -> float:
        """A number above 0."""
        return self._value(
            key, lambda value: type(value) in (int, float) and 0 < value < inf, "a number above 0", default
        )

    def _value(self, key: str, valid: Callable[[Any], bool], expected: str, default: Any = None) -> Any:
        value = self.values
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        value = default if value is None else value
        if not valid(value):
            found = "missing" if value is None else f"{str(value)[:40]!r}"
            raise UserError(f"{self.file}: {key} is {found}: it must be {expected}, as it was in training")
        return value
