"""Opening a backbone: trained weights from a folder or hub, or random ones from a config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from msa_train.errors import UserError


def open_backbone(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A Hugging Face causal language model.

    Args:
        name: Folder or hub name for trained weights; a `*.json` file (a config.json) for random ones of that shape.
        dtype: Precision of the weights.

    Raises:
        UserError: It cannot be opened.
    """
    if name.endswith(".json"):
        return AutoModelForCausalLM.from_config(open_config(name), dtype=dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _cannot_open(name, error) from error


def open_config(name: str) -> PreTrainedConfig:
    """The backbone's config alone, from the same kinds of names; no weight is read."""
    if name.endswith(".json") and not Path(name).is_file():
        raise UserError(f"model.backbone: no such file '{name}'")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_open(name, error) from error


def fit_vocabulary(backbone: PreTrainedModel, tokens: int) -> int:
    """Grows the embeddings for a tokenizer that has more tokens than the model; returns how many were added.

    New rows are drawn from the old ones' distribution, which is Hugging Face's way.
    """
    embeddings: Any = backbone.get_input_embeddings()
    missing = tokens - int(embeddings.weight.shape[0])
    if missing > 0:
        backbone.resize_token_embeddings(tokens)
    return max(missing, 0)


def _cannot_open(name: str, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0]
    return UserError(f"model.backbone: cannot open '{name}': {reason}")
