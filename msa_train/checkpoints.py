"""Checkpoints: reading one, holding it against a model, and restoring a model of it without a trainer.

A checkpoint is Lightning's, with `msa_train` beside `state_dict`: what the weights do not tell. The invariant: nothing
in it is executed, and no weight is loaded before all names and shapes are known to fit.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from msa_train.backbone import fit_vocabulary, open_config
from msa_train.config import MSAConfig
from msa_train.errors import UserError
from msa_train.kernels.varlen import Backend
from msa_train.model import MemorySparseModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # the values of model.weights
PREFIX = "model."  # the model's place in the module that was saved


def newest_checkpoint(folder: Path) -> Path | None:
    """A run's `last.ckpt`, the newest where there are several; None where there is none."""
    return max(folder.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, its tensors mapped from the file.

    Raises:
        UserError: It cannot be read, or is not of this project.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({str(error).strip().partition(chr(10))[0]})") from error
    missing = {"state_dict", "msa_train"} - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise UserError(f"{path}: not a checkpoint of this project (no {', '.join(sorted(missing))})")
    return checkpoint


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
    backbone_name: str, msa: MSAConfig, dtype: torch.dtype, path: Path, tokens: int, backend: Backend
) -> MemorySparseModel:
    """The trained model of a checkpoint, on the CPU.

    Args:
        backbone_name: Folder, hub name or config.json of the backbone; its shape alone is read.
        msa: The memory's sizes.
        dtype: Precision of the weights.
        path: The checkpoint.
        tokens: Size of the tokenizer.
        backend: Attention back end.

    Raises:
        UserError: It is no checkpoint, or of another architecture.
    """
    checkpoint = read_checkpoint(path)
    with torch.random.fork_rng(devices=[]):
        backbone = AutoModelForCausalLM.from_config(open_config(backbone_name), dtype=dtype)
        fit_vocabulary(backbone, tokens)
        model = MemorySparseModel(backbone, msa, backend)
    check_architecture(model, checkpoint, str(path))
    model.load_state_dict({name.removeprefix(PREFIX): weight for name, weight in checkpoint["state_dict"].items()})
    return model
