"""LoRA: small adapters on a backbone whose own weights stay as they are, by the peft library (Hu et al., 2021).

    layer(x) = W x + alpha / rank * B A dropout(x)

A and B are put into the decoder in place, so all that calls its layers calls them too. Routers have none: they train
in full. The invariant: `merge` leaves a decoder without adapters, of the names and shapes that it had before them, that
computes the same but for rounding.

Shapes: of a layer [out, in], A is [rank, in] and B [out, rank]; B starts at 0, so nothing changes until it is trained.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel

from msa_train.errors import UserError

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTER = ".lora_"  # in the names of the adapters' weights
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
        except (KeyError, TypeError, ValueError) as error:
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
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"model.lora needs peft: {INSTALL}")
    from peft import LoraConfig, inject_adapter_in_model

    config: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    inject_adapter_in_model(LoraConfig(**config, target_modules=list(lora.targets)), backbone)


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
