"""Checkpoints: reading one, holding it against a model, and restoring a model of it without a trainer.

A checkpoint is a folder (folders.py), the same whatever strategy saved it. The invariant: nothing in it is executed,
and no weight is loaded before all names and shapes are known to fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from msa_train.backbone import (
    fit_vocabulary,
    open_adapters,
    open_backbone,
    open_config,
    open_memory,
    weight_files,
)
from msa_train.config import MSAConfig
from msa_train.errors import UserError
from msa_train.folder_files import FolderReader, read_facts
from msa_train.folders import FACTS, MANIFEST, checkpoints_of, is_whole, verify
from msa_train.kernels.choice import Kernels
from msa_train.lora import LoRA, adapt, merge
from msa_train.model import MemorySparseModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # the values of model.weights
PREFIX = "model."  # the model's place in the module that was saved
BACKBONE_PREFIX = "backbone."  # the backbone's place in the model


def newest_checkpoint(folder: Path) -> Path | None:
    """A run's newest checkpoint that has all its files, at their sizes; None where there is none."""
    return next((checkpoint for checkpoint in checkpoints_of(folder) if is_whole(checkpoint)), None)


def find_checkpoint(
    folder: Path, asked: str | None, tell: Callable[[str], None], needed: Collection[str] | None = None
) -> Path | None:
    """The checkpoint to go on from, all of whose files have their checksums.

    Args:
        folder: The run's.
        asked: `last` for the newest that is sound, or a path; None for none.
        tell: Takes what is wrong with newer ones.
        needed: Files to look at; None for all.

    Raises:
        UserError: There is none, or the one that is asked for is damaged.
    """
    if asked is None:
        return None
    if asked != "last":
        if not Path(asked).exists():
            raise UserError(f"--ckpt_path: no such checkpoint '{asked}'")
        check_sound(Path(asked), needed)
        return Path(asked)
    wrong: UserError | None = None
    for checkpoint in checkpoints_of(folder):
        try:
            check_sound(checkpoint, needed)
        except UserError as error:
            wrong = wrong or error
            tell(str(error))
        else:
            return checkpoint
    raise wrong or UserError(f"--ckpt_path last: {folder} has no checkpoint yet; leave --ckpt_path out to start")


def check_sound(checkpoint: Path, needed: Collection[str] | None = None) -> None:
    """Reads a checkpoint's files and compares their checksums.

    Raises:
        UserError: It is none, or a file is missing or damaged; it is named.
    """
    if not (checkpoint / FACTS).is_file() and not (checkpoint / MANIFEST).is_file():
        raise UserError(f"{checkpoint}: not a checkpoint of this project, which is a folder with {FACTS}")
    for _ in verify(checkpoint, needed):
        pass


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, its tensors mapped from the file: `state_dict`, `msa_train` and `global_step`.

    Args:
        path: The folder (folders.py).

    Raises:
        UserError: It cannot be read, or is not of this project.
    """
    reader = FolderReader(path)
    return {"state_dict": reader.weights(), "msa_train": reader.facts, "global_step": reader.facts["global_step"]}


def check_resumable(path: Path, packs_per_step: int) -> None:
    """Holds the packs of a step that a run was saved with against this run's: which pack comes next depends on them.

    Args:
        path: The checkpoint.
        packs_per_step: Of all ranks.

    Raises:
        UserError: They differ.
    """
    saved = read_facts(path)["packs_per_step"]
    if saved != packs_per_step:
        raise UserError(
            f"{path} was saved by a run of {saved} packs a step, this one takes {packs_per_step}: set "
            "--trainer.accumulate_grad_batches so that ranks times accumulated packs are as many, or start from its "
            f"weights with --model.init_from {path}"
        )


def check_architecture(model: MemorySparseModel, checkpoint: dict[str, Any], place: str) -> None:
    """Holds a checkpoint's names and shapes against a model's, which may be on no device.

    Raises:
        UserError: They differ; the first difference is named.
    """
    ours = {PREFIX + name: weight for name, weight in model.state_dict().items()}
    theirs = checkpoint["state_dict"]
    for name, weight in ours.items():
        if name not in theirs:
            raise UserError(f"{place}: another architecture: it has no '{name}'")
        if theirs[name].shape != weight.shape:
            raise UserError(
                f"{place}: another architecture: '{name}' is {tuple(theirs[name].shape)} there, "
                f"{tuple(weight.shape)} here"
            )
    extra = next((name for name in theirs if name not in ours), None)
    if extra is not None:
        raise UserError(f"{place}: another architecture: it has '{extra}', which this model lacks")


def check_chunk_size(msa: MSAConfig, checkpoint: dict[str, Any], place: str) -> None:
    """Holds a checkpoint's chunk size, which no weight shows, against a run's.

    Raises:
        UserError: They differ.
    """
    trained = checkpoint["msa_train"]["chunk_size"]
    if trained != msa.chunk_size:
        raise UserError(f"{place}: trained with msa.chunk_size {trained}, this run has {msa.chunk_size}")


def check_adapters(lora: LoRA | None, checkpoint: dict[str, Any], place: str) -> None:
    """Holds a checkpoint's adapters, whose scale no weight shows, against a run's.

    Raises:
        UserError: They differ.
    """
    trained, ours = checkpoint["msa_train"].get("lora"), None if lora is None else lora.facts
    if trained != ours:
        raise UserError(
            f"{place}: trained with model.lora {json.dumps(trained)}, this run has {json.dumps(ours)}: give the same, "
            "or `msa-train export` it and start from that folder with --model.backbone"
        )


def restore(
    backbone_name: str,
    msa: MSAConfig,
    dtype: torch.dtype,
    path: Path,
    tokens: int,
    kernels: Kernels,
    merged: bool = True,
) -> MemorySparseModel:
    """The trained model of a checkpoint, on the CPU.

    Args:
        backbone_name: Folder, hub name or config.json of the backbone; its shape alone is read.
        msa: The memory's sizes.
        dtype: Precision of the weights.
        path: The checkpoint.
        tokens: Size of the tokenizer.
        kernels: Which implementations to run.
        merged: Whether adapters are merged into the backbone's weights.

    Raises:
        UserError: It is no checkpoint, or of another architecture.
    """
    checkpoint = read_checkpoint(path)
    lora = LoRA.of(checkpoint["msa_train"].get("lora"), str(path))
    with torch.random.fork_rng(devices=[]):
        backbone = AutoModelForCausalLM.from_config(open_config(backbone_name), dtype=dtype)
        fit_vocabulary(backbone, tokens)
        adapt(backbone, lora)
        model = MemorySparseModel(backbone, msa, kernels)
    check_architecture(model, checkpoint, str(path))
    model.load_state_dict({name.removeprefix(PREFIX): weight for name, weight in checkpoint["state_dict"].items()})
    if lora is not None and merged:
        merge(backbone)
    return model


def restore_exported(name: str, msa: MSAConfig, backbone: str | None = None, merged: bool = True) -> MemorySparseModel:
    """The trained model of a folder that holds a backbone and its routers, on the CPU, in the precision of its weights.

    Args:
        name: Folder or hub name.
        msa: The memory's sizes.
        backbone: Where the backbone is, if the folder is of routers alone and it is not where they say.
        merged: Whether adapters that lie beside them are merged into its weights.

    Raises:
        UserError: Some of the weights are missing, of other sizes, or cannot be read.
    """
    adapters = None if merged else open_adapters(name)
    with torch.random.fork_rng(devices=[]):
        model = MemorySparseModel(open_backbone(name, None, backbone, adapters), msa)
    load_routers(model, name)
    return model


def load_routers(model: MemorySparseModel, backbone_name: str) -> None:
    """Gives a model the routers that its backbone's folder holds, where it holds any; else it keeps its own.

    Args:
        model: A model over that backbone.
        backbone_name: As for `open_backbone`.

    Raises:
        UserError: They are of other layers or sizes, or cannot be read.
    """
    trained = None if backbone_name.endswith(".json") else open_memory(backbone_name)
    if trained is None:
        return
    if trained.routed_layers != model.routed_layers:
        raise UserError(
            f"model.msa.routed_layers are {list(model.routed_layers)}, but '{backbone_name}' has routers in layers "
            f"{list(trained.routed_layers)}: give --model.msa.routed_layers '{list(trained.routed_layers)}'"
        )
    left = {name.removeprefix(BACKBONE_PREFIX): weight for name, weight in model.router_parameters()}
    for file in weight_files(backbone_name):
        try:
            with safe_open(file, "pt") as handle, torch.no_grad():
                for name in left.keys() & handle.keys():
                    ours, theirs = left.pop(name), handle.get_tensor(name)
                    if theirs.shape != ours.shape:
                        raise UserError(f"{file}: '{name}' is {tuple(theirs.shape)}, this model's {tuple(ours.shape)}")
                    ours.copy_(theirs)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not readable weights ({error}); copy or export them again") from error
    if left:
        raise UserError(f"model.backbone: '{backbone_name}' lacks the router '{min(left)}' that its config.json names")
