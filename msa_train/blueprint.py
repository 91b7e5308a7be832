"""Blueprint: what a model is made of, and the ways to build it: on no device, untrained, or with trained weights.

The invariant: whatever was drawn before, the same seed builds the same model, on every rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoModelForCausalLM

from msa_train.backbone import (
    check_adapters_beside,
    check_home,
    fit_vocabulary,
    open_adapters,
    open_backbone,
    open_config,
    open_home,
)
from msa_train.checkpoints import (
    DTYPES,
    PREFIX,
    check_adapters,
    check_architecture,
    check_chunk_size,
    load_routers,
    read_checkpoint,
    restore,
)
from msa_train.config import MSAConfig
from msa_train.errors import UserError
from msa_train.kernels.choice import Kernels
from msa_train.lora import LoRA, adapt
from msa_train.model import MemorySparseModel, Recompute, check_supported

Weights = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Blueprint:
    """What a model is made of.

    Args:
        backbone: Folder or hub name of a Hugging Face decoder; or a config.json for random weights of that shape.
        msa: The memory's sizes.
        kernels: Which implementations to run, where there are several.
        recompute: What is computed again in the backward pass.
        kept_layers: With `layers`, how many of the last ones keep what they computed.
        weights: Precision of the weights.
        lora: Adapters in the place of the backbone's own weights; None for none.

    Raises:
        UserError: Layers are kept where none is computed again.
    """

    backbone: str
    msa: MSAConfig
    kernels: Kernels
    recompute: Recompute
    kept_layers: int
    weights: Weights
    lora: LoRA | None

    def __post_init__(self) -> None:
        if self.kept_layers and self.recompute != "layers":
            raise UserError(f"model.kept_layers is {self.kept_layers}: it needs model.recompute layers")

    def blank(self, tokens: int | None) -> MemorySparseModel:
        """The model on no device: its names and shapes, for nothing.

        Args:
            tokens: Size of the tokenizer, if there is one.

        Raises:
            UserError: The backbone cannot be opened or routed.
        """
        config = open_config(self.backbone)
        check_supported(config)
        if tokens is not None:
            config.vocab_size = max(config.vocab_size, tokens)
        with torch.device("meta"):
            backbone = AutoModelForCausalLM.from_config(config)
            adapt(backbone, self.lora)
            return MemorySparseModel(backbone, self.msa, self.kernels, self.recompute, self.kept_layers)

    def check(self, source: Path | None, resuming: bool, tokens: int | None) -> None:
        """Builds the model on no device and holds it against the weights to be loaded: an error here costs nothing.

        Args:
            source: Checkpoint, or folder of routers alone, that the run starts from.
            resuming: Whether the run goes on from it.
            tokens: Size of the tokenizer, if there is one.

        Raises:
            UserError: The backbone cannot be opened or routed, or the weights are of another architecture.
        """
        model = self.blank(tokens)
        check_home(self.backbone)
        check_adapters_beside(self.backbone, model.backbone)
        if source is not None and not resuming and _routers_alone(source):
            check_home(str(source), self.backbone)
            self._adapters_in(str(source))
            check_adapters_beside(str(source), model.backbone)
            load_routers(model, str(source))  # onto no device: names and shapes alone
        elif source is not None:
            saved = read_checkpoint(source)
            check_adapters(self.lora, saved, str(source))
            check_architecture(model, saved, str(source))
            if resuming:
                check_chunk_size(self.msa, saved, str(source))

    def untrained(self, seed: int, tokens: int | None) -> MemorySparseModel:
        """The model as it is before all training: the backbone's own weights; its own routers too where its folder has
        any, and else routers as they are drawn.

        Args:
            seed: Of what is drawn.
            tokens: Size of the tokenizer, if there is one.
        """
        return self._drawn(self.backbone, seed, tokens)

    def started(self, source: str | None, seed: int, tokens: int | None) -> MemorySparseModel:
        """The model before training, or with a checkpoint's weights, or with routers alone.

        Args:
            source: Checkpoint or folder of routers; None for the model before training.
            seed: As for `untrained`.
            tokens: As for `untrained`.

        Raises:
            UserError: The weights are of another architecture.
        """
        if source is not None and _routers_alone(Path(source)):
            adapters = self._adapters_in(source)
            merged = adapters is None and open_adapters(source) is not None
            words = "routers alone, their adapters merged" if merged else "routers alone"
            rank_zero_info(f"msa-train: model.init_from: {words}; the backbone is {self.backbone}")
            return self._drawn(source, seed, tokens, self.backbone, adapters)
        model = self.untrained(seed, tokens)
        if source is not None:
            saved = read_checkpoint(Path(source))
            check_adapters(self.lora, saved, source)
            check_architecture(model, saved, source)
            model.load_state_dict({name.removeprefix(PREFIX): weight for name, weight in saved["state_dict"].items()})
        return model

    def restored(self, path: Path, tokens: int) -> MemorySparseModel:
        """The trained model of a checkpoint, for use alone: adapters are merged.

        Args:
            path: The checkpoint.
            tokens: Size of the tokenizer.

        Raises:
            UserError: It is no checkpoint, or of another architecture.
        """
        return restore(self.backbone, self.msa, DTYPES[self.weights], path, tokens, self.kernels)

    def _drawn(
        self, name: str, seed: int, tokens: int | None, elsewhere: str | None = None, adapters: LoRA | None = None
    ) -> MemorySparseModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # alike on all ranks, whatever was drawn since seed_everything
            backbone = open_backbone(name, DTYPES[self.weights], elsewhere, adapters)
            if tokens is not None:
                fit_vocabulary(backbone, tokens)
            if adapters is None:
                adapt(backbone, self.lora)
            model = MemorySparseModel(backbone, self.msa, self.kernels, self.recompute, self.kept_layers)
        load_routers(model, name)
        return model

    def _adapters_in(self, folder: str) -> LoRA | None:
        """The run's adapters, if those of routers alone are to go into them; None if they are merged."""
        theirs = open_adapters(folder)
        if theirs is None or self.lora is None:
            return None
        if theirs.facts != self.lora.facts:
            raise UserError(
                f"{folder}: its adapters are of model.lora {json.dumps(theirs.facts)}, this run has "
                f"{json.dumps(self.lora.facts)}: give the same to train them on, none to have them merged, or start "
                "with --model.backbone from that folder, which merges them and puts new ones beside"
            )
        return self.lora


def _routers_alone(source: Path) -> bool:
    return (source / "config.json").is_file() and open_home(str(source)) is not None
