"""Opening a backbone: trained weights from a folder or hub, or random ones from a config.json."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from msa_train.errors import UserError


def open_backbone(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A Hugging Face causal language model.

    Args:
        name: Folder or hub name for trained weights; a `*.json` file (a config.json) for random ones of that shape.
        dtype: Precision of the weights.

    Raises:
        UserError: It cannot be opened.
    """
    random_weights = name.endswith(".json")
    if random_weights and not Path(name).is_file():
        raise UserError(f"model.backbone: no such file '{name}'")
    try:
        if random_weights:
            config = AutoConfig.from_pretrained(name)
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"model.backbone: cannot open '{name}': {reason}") from error


def fit_vocabulary(backbone: PreTrainedModel, tokens: int) -> int:
    """Grows the embeddings for a tokenizer that has more tokens than the model; returns how many were added.

    New rows start at the mean of the old ones, which is Hugging Face's way.
    """
    missing = tokens - backbone.get_input_embeddings().weight.shape[0]
    if missing > 0:
        backbone.resize_token_embeddings(tokens)
    return max(missing, 0)
