"""LoRA: small adapters on a backbone whose own weights stay as they are, by the peft library (Hu et al., 2021).

    layer(x) = W x + alpha / rank * B A dropout(x)

A and B are put into the decoder in place, so all that calls its layers calls them too. Routers have none: they train
in full. The invariant: `merge` leaves a decoder without adapters, of the names and shapes that it had before them, that
computes the same but for rounding, and is free to be trained.

Shapes: of a layer [out, in], A is [rank, in] and B [out, rank]; B starts at 0, so nothing changes until it is trained.
In files and decoders they go by LAYER.lora_A.default.weight and LAYER.lora_B.default.weight.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from msa_train.errors import UserError

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTER = ".lora_"  # in the names of the adapters' weights
OWN = ".base_layer."  # in the names of the weights that have adapters beside them
INSTALL = "pip install 'msa-train[lora]'"


@dataclass(frozen=True)
class LoRA:
    """Adapters of the backbone.

    Args:
        rank: Rows of A, columns of B.
        alpha: What they give counts alpha / rank times.
        dropout: Share of a layer's inputs that the adapters do not see, in training.
        targets: Layers that have adapters, in all of the decoder.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[Target, ...] = get_args(Target)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        wrong = [
            f"{name} is {value!r}: give {need}"
            for name, value, need, good in (
                ("rank", self.rank, "at least 1", self.rank >= 1),
                ("alpha", self.alpha, "a number above 0", self.alpha > 0),
                ("dropout", self.dropout, "a share from 0, below 1", 0 <= self.dropout < 1),
                (
                    "targets", list(self.targets), f"some of {', '.join(get_args(Target))}",
                    bool(self.targets) and set(self.targets) <= set(get_args(Target)),
                ),
            )
            if not good
        ]  # fmt: skip
        if wrong:
            raise UserError("model.lora: " + "; ".join(wrong))

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint's weights do not tell of them, as plain data; dropout leaves no trace there."""
        return {"rank": self.rank, "alpha": float(self.alpha), "targets": sorted(set(self.targets))}

    @staticmethod
    def of(facts: Any, place: str) -> LoRA | None:
        """Adapters by their facts; None by None.

        Args:
            facts: What `facts` gave.
            place: Where they come from.

        Raises:
            UserError: They are something else.
        """
        if facts is None:
            return None
        try:
            return LoRA(int(facts["rank"]), float(facts["alpha"]), 0.0, tuple(facts["targets"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{place}: its facts say nothing readable of its adapters ({error})") from error


def adapt(backbone: PreTrainedModel, lora: LoRA | None) -> None:
    """Puts adapters into a decoder and freezes its own weights; None leaves it alone.

    Args:
        backbone: The decoder, without routers.
        lora: Its adapters, drawn by the random state of now.

    Raises:
        UserError: peft is missing.
    """
    if lora is None:
        return
    _need_peft()
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    config: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    inject_adapter_in_model(LoraConfig(**config, target_modules=list(lora.targets)), backbone)
    for part in backbone.modules():
        if isinstance(part, LoraLayer):
            part.cast_input_dtype_enabled = False  # to float32, which autocast would round back at once


@torch.no_grad()
def merge(backbone: PreTrainedModel) -> None:
    """Adds the adapters to the weights, each sum in float32 and rounded once, and takes them out of the decoder."""
    from peft.tuners.lora import LoraLayer

    adapted: dict[str, Any] = {name: part for name, part in backbone.named_modules() if isinstance(part, LoraLayer)}
    for name, layer in adapted.items():
        parent, _, own = name.rpartition(".")
        plain = layer.get_base_layer()
        dtype = plain.weight.dtype
        layer.float()
        layer.merge()
        setattr(backbone.get_submodule(parent), own, plain.to(dtype))
    del backbone.peft_config
    backbone.requires_grad_(True)


# --- apart from the decoder -------------------------------------------------------------------------------------------


def adapters_of(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """The adapters of a decoder, by name; none where it has none."""
    return {name: weight for name, weight in backbone.named_parameters() if ADAPTER in name}


def own_weights(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """All else in a decoder, by the names that it has without adapters."""
    named = backbone.named_parameters()
    return {name.replace(OWN, "."): weight for name, weight in named if ADAPTER not in name}


def check_adapters_in(file: Path, backbone: PreTrainedModel, lora: LoRA | None) -> None:
    """Holds the adapters in a file against those that a decoder is to have; no weight is read.

    Args:
        file: Weights, adapters among them.
        backbone: The decoder, with such adapters or without, on any device.
        lora: What they are said to be; None for none.

    Raises:
        UserError: They are of other layers or sizes, or cannot be read; or peft is missing.
    """
    if lora is not None:
        _need_peft()
    try:
        with safe_open(file, "pt") as handle:
            names = [name for name in handle.keys() if ADAPTER in name]
            found = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not readable weights ({error}); copy or export them again") from error
    wanted = {} if lora is None else _shapes(backbone, lora)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{file}: '{name}' is {found.get(name, 'missing')}, by its config.json it must be "
                f"{wanted.get(name, 'absent')}; copy or export both again"
            )


@torch.no_grad()
def restore_adapters(file: Path, backbone: PreTrainedModel, lora: LoRA | None) -> None:
    """Puts the adapters that a file has into a decoder.

    Args:
        file: As for `check_adapters_in`.
        backbone: The decoder, without adapters.
        lora: As there.

    Raises:
        UserError: As there.
    """
    check_adapters_in(file, backbone, lora)
    adapt(backbone, lora)
    with safe_open(file, "pt") as handle:
        for name, weight in adapters_of(backbone).items():
            weight.copy_(handle.get_tensor(name))


def _shapes(backbone: PreTrainedModel, lora: LoRA) -> dict[str, tuple[int, int]]:
    """Names and shapes of a decoder's adapters."""
    shapes = {}
    for name, layer in backbone.named_modules():
        if name.rpartition(".")[2] in lora.targets:
            sizes: Any = layer  # linear, adapted or not
            shapes[f"{name}{ADAPTER}A.default.weight"] = (lora.rank, sizes.in_features)
            shapes[f"{name}{ADAPTER}B.default.weight"] = (sizes.out_features, lora.rank)
    return shapes


def _need_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"adapters (model.lora) need peft: {INSTALL}")
