"""Routers apart from their backbone: what holds a folder of routers together with weights that lie elsewhere.

    routers.safetensors    the routers, under the published names; rows that embeddings grew by, where they did; the
                           run's adapters (lora.py), where it has any
    config.json            as that of a whole export (export.py); its `msa_train` says which backbone they belong to,
                           and what the adapters are

The invariant: both together are bitwise the whole export in the same precision. A backbone of other sizes or other
weights is refused: routers choose by what its layers compute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from msa_train.errors import UserError

ROUTERS = "routers.safetensors"
ROUTER = ".router_"  # in the names of the routers' weights
NAME, VOCABULARY, SHA256 = "backbone", "backbone_vocabulary", "backbone_sha256"  # keys of config.json's `msa_train`
ADAPTERS = "lora"  # another: what `LoRA.facts` gave
GROWN = ".grown"  # ends the name of the rows that an embedding grew by
SIZES = (
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "attention_bias", "mlp_bias", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
)  # fmt: skip
SAMPLED = 1024  # numbers of each weight that tell one backbone from another


@dataclass(frozen=True)
class Home:
    """The backbone that routers belong to.

    Args:
        name: Folder or hub name.
        vocabulary: Rows of its embeddings.
        sha256: Of the first numbers of its weights, rounded to bfloat16: the same in every precision.
    """

    name: str
    vocabulary: int
    sha256: str

    @staticmethod
    def of(name: str, backbone: PreTrainedModel) -> Home:
        """That of an opened backbone."""
        return Home(name, len(_embeddings(backbone)["model.embed_tokens.weight"]), _digest(backbone))

    @staticmethod
    def read(ours: Any, place: str) -> Home | None:
        """That which a config.json names; None where the weights lie beside it.

        Args:
            ours: Its `msa_train`.
            place: Where it lies.

        Raises:
            UserError: It names one incompletely.
        """
        if not isinstance(ours, dict) or NAME not in ours:
            return None
        home = Home(ours[NAME], ours.get(VOCABULARY), ours.get(SHA256))  # type: ignore[arg-type]
        if not (isinstance(home.name, str) and type(home.vocabulary) is int and isinstance(home.sha256, str)):
            raise UserError(f"{place}: config.json names its backbone incompletely: export the routers again")
        return home

    @property
    def facts(self) -> dict[str, Any]:
        """What `read` takes."""
        return {NAME: self.name, VOCABULARY: self.vocabulary, SHA256: self.sha256}

    def check_sizes(self, wanted: PreTrainedConfig, found: PreTrainedConfig, place: str) -> None:
        """Holds a backbone's config against that of the routers.

        Args:
            wanted: The routers'.
            found: The backbone's.
            place: What to call the two.

        Raises:
            UserError: They differ in what is computed.
        """
        theirs = {**{name: getattr(found, name, None) for name in SIZES}, "vocab_size": found.vocab_size}
        ours = {**{name: getattr(wanted, name, None) for name in SIZES}, "vocab_size": self.vocabulary}
        for name, value in ours.items():
            if theirs[name] != value:
                raise UserError(
                    f"{place}: its {name} is {theirs[name]}, the routers belong to a backbone of {value} (in their "
                    f"training: '{self.name}')"
                )

    def check_weights(self, backbone: PreTrainedModel, place: str) -> None:
        """Holds a backbone's weights against those that the routers were trained on.

        Raises:
            UserError: They differ.
        """
        if _digest(backbone) != self.sha256:
            raise UserError(
                f"{place}: a backbone of the same sizes but of other weights than the routers were trained on "
                f"('{self.name}')"
            )


def check_untrained(trained: Mapping[str, Tensor], began: PreTrainedModel, place: str) -> None:
    """Holds a run's backbone against the one that it began as; rows of its embeddings may have been added.

    Args:
        trained: The run's weights, without adapters.
        began: What it began as, in the same precision.
        place: What to call that.

    Raises:
        UserError: A weight differs.
    """
    before = dict(began.named_parameters())
    for name, weight in trained.items():
        if ROUTER not in name and not torch.equal(weight[: len(before[name])], before[name]):
            raise UserError(
                f"{place} has another '{name}' than the run: its backbone was trained too, or rounded, or adapters "
                "were merged into it, and routers alone are not that run; export the whole, without --only"
            )


def grown_rows(backbone: PreTrainedModel, home: Home) -> dict[str, Tensor]:
    """The rows that a run's embeddings have beyond those of its backbone, by name."""
    embeddings = _embeddings(backbone).items()
    return {name + GROWN: weight[home.vocabulary :] for name, weight in embeddings if len(weight) > home.vocabulary}


@torch.no_grad()
def restore_rows(backbone: PreTrainedModel, home: Home, file: Path) -> None:
    """Gives embeddings that have grown anew the rows that they had in training.

    Raises:
        UserError: They cannot be read, or do not fit.
    """
    try:
        with safe_open(file, "pt") as handle:
            kept = {name: handle.get_tensor(name) for name in handle.keys() if name.endswith(GROWN)}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not readable weights ({error}); copy or export them again") from error
    for name, rows in grown_rows(backbone, home).items():
        if name not in kept or kept[name].shape != rows.shape:
            raise UserError(f"{file}: not the rows '{name}' that its config.json tells of; export it again")
        rows.copy_(kept[name])


def _embeddings(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """What has a row for every token: once where it is tied."""
    return {name: weight for name, weight in backbone.named_parameters() if "embed_tokens" in name or "lm_head" in name}


def _digest(backbone: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(backbone.named_parameters()):
        if ROUTER not in name:
            sample = weight.detach().flatten()[:SAMPLED].to("cpu", torch.bfloat16)
            digest.update(name.encode())
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
