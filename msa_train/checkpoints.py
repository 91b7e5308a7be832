"""Checkpoints: reading one, holding it against a model, and restoring a model of it without a trainer.

A checkpoint is Lightning's file, with `msa_train` beside `state_dict`: what the weights do not tell. Or it is ZeRO's
folder, which has the same in other files (strategies.py). The invariant: nothing in it is executed, and no weight is
loaded before all names and shapes are known to fit.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from msa_train.backbone import fit_vocabulary, open_backbone, open_config, open_memory, weight_files
from msa_train.config import MSAConfig
from msa_train.errors import UserError
from msa_train.kernels.choice import Kernels
from msa_train.model import MemorySparseModel
from msa_train.strategies import FACTS, WEIGHTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # the values of model.weights
PREFIX = "model."  # the model's place in the module that was saved
BACKBONE_PREFIX = "backbone."  # the backbone's place in the model


def newest_checkpoint(folder: Path) -> Path | None:
    """A run's `last.ckpt`, the newest where there are several; None where there is none."""
    return max(folder.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, its tensors mapped from the file: `state_dict`, `msa_train` and `global_step`.

    Args:
        path: A file, or a folder that ZeRO wrote.

    Raises:
        UserError: It cannot be read, or is not of this project.
    """
    if path.is_dir():
        return _read_folder(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({str(error).strip().partition(chr(10))[0]})") from error
    missing = {"state_dict", "msa_train"} - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise UserError(f"{path}: not a checkpoint of this project (no {', '.join(sorted(missing))})")
    return checkpoint


def _read_folder(path: Path) -> dict[str, Any]:
    facts = _read_facts(path)
    try:
        weights = load_file(path / WEIGHTS)
        weights |= {name: weights[same] for name, same in facts["tied"].items()}
    except (SafetensorError, OSError, KeyError, AttributeError) as error:
        raise UserError(f"{path / WEIGHTS}: not readable weights ({error})") from error
    return {"state_dict": weights, "msa_train": facts, "global_step": facts["global_step"]}


def _read_facts(path: Path) -> dict[str, Any]:
    needed = {"chunk_size", "skipped_steps", "global_step", "tied", "stage", "ranks"}
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a checkpoint of this project (no readable {FACTS})") from error
    missing = needed - set(facts if isinstance(facts, dict) else ())
    if missing:
        raise UserError(f"{path / FACTS}: not of this project (no {', '.join(sorted(missing))})")
    return facts


def check_resumable(path: Path, stage: int, ranks: int) -> None:
    """Holds how a checkpoint was saved against how a run would go on from it: DeepSpeed's parts fit no other way.

    Args:
        path: The checkpoint.
        stage: ZeRO's stage; 0 for another strategy.
        ranks: How many there are.

    Raises:
        UserError: They differ.
    """
    if path.is_dir():
        facts = _read_facts(path)
        saved = (facts["stage"], facts["ranks"])
        if saved == (stage, ranks):
            return
        how = f"was saved by ZeRO stage {saved[0]} on {saved[1]} ranks"
    elif not stage:
        return
    else:
        how = "is no checkpoint of ZeRO"
    here = f"ZeRO stage {stage} on {ranks} ranks" if stage else "without ZeRO"
    raise UserError(f"{path} {how}, this run is {here}: resume it as it was, or start from its weights with "
                    f"--model.init_from {path}")  # fmt: skip


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


def restore(
    backbone_name: str, msa: MSAConfig, dtype: torch.dtype, path: Path, tokens: int, kernels: Kernels
) -> MemorySparseModel:
    """The trained model of a checkpoint, on the CPU.

    Args:
        backbone_name: Folder, hub name or config.json of the backbone; its shape alone is read.
        msa: The memory's sizes.
        dtype: Precision of the weights.
        path: The checkpoint.
        tokens: Size of the tokenizer.
        kernels: Which implementations to run.

    Raises:
        UserError: It is no checkpoint, or of another architecture.
    """
    checkpoint = read_checkpoint(path)
    with torch.random.fork_rng(devices=[]):
        backbone = AutoModelForCausalLM.from_config(open_config(backbone_name), dtype=dtype)
        fit_vocabulary(backbone, tokens)
        model = MemorySparseModel(backbone, msa, kernels)
    check_architecture(model, checkpoint, str(path))
    model.load_state_dict({name.removeprefix(PREFIX): weight for name, weight in checkpoint["state_dict"].items()})
    return model


def restore_exported(name: str, msa: MSAConfig) -> MemorySparseModel:
    """The trained model of a folder that holds a backbone and its routers, on the CPU, in the precision of its weights.

    Args:
        name: Folder or hub name.
        msa: The memory's sizes.

    Raises:
        UserError: Some of the weights are missing, of other sizes, or cannot be read.
    """
    with torch.random.fork_rng(devices=[]):
        model = MemorySparseModel(open_backbone(name, None), msa)
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
