"""RouterMonitor: every routed layer over the whole run, in one picture, and a warning before a layer is lost.

A router collapses unseen: its loss falls while it sends every query to the same few documents, and its recall sinks
below that of the router that training began with. So layers are watched twice: their diversity on training packs at
every logging step, and their recall on held-out queries, which is held against a measurement before the first step.
The invariant: every rank sees the same numbers, and no random number, mode or weight of the run is other than without.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor

from callbacks.parts import packed_memory, parts, undisturbed
from msa_train.errors import UserError
from msa_train.findings import Finding
from msa_train.module import COLLAPSED, MEND, SETTLED, MemorySparseModule
from msa_train.pack import MemoryPack

OVERALL = "overall"  # documents ranked by their mean score over layers
MEASURES = {  # and their colours, the brighter or bluer the better
    "recall@1": "viridis",
    "margin": "RdBu",
    "diversity": "viridis",
    "entropy": "viridis",
    "coverage": "viridis",
    "hubness": "viridis_r",
}
DISTINCT = int(1 / COLLAPSED) + 1  # queries of a pack from which on its diversity can fall below COLLAPSED

Row = dict[str, float]  # a measure of every routed layer, and overall


class RouterMonitor(L.Callback):
    """Draws recall, margin, diversity, entropy, coverage and hubness of every routed layer over the steps, and warns.

    The picture is TensorBoard's `routing/layers/{split}`, drawn anew at every validation; resuming goes on with it. A
    run that starts, and validates, is validated once more before its first step. Told once for each layer: a collapse,
    as training packs or held-out queries show it, and a held-out recall@1 below that before training. The model's own
    warning, of a collapse overall, is then left to this callback.

    Args:
        patience: Logging steps in a row with a collapsed diversity on training packs that make a collapse.
        settle: Steps before which no collapse is told of, since an untrained router may well look like one.
        slack: How far recall@1 may lie below that before training; a few queries more or less are chance.
    """

    def __init__(self, patience: int = 3, settle: int = SETTLED, slack: float = 0.02) -> None:
        for name, value, least in (("patience", patience, 1), ("settle", settle, 0), ("slack", slack, 0)):
            if value < least:
                raise UserError(f"RouterMonitor: {name} is {value}: give at least {least}")
        self.patience, self.settle, self.slack = patience, settle, slack
        self.history: dict[str, list[dict[str, Any]]] = {}  # of every split: its validations, oldest first
        self.low: dict[str, int] = {}  # of every layer: logging steps in a row with a collapsed diversity
        self.told: dict[str, list[str]] = {"collapse": [], "fall": []}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes the watch over from the module."""
        _, module = parts(trainer, pl_module, self)
        if stage == "fit":
            module.watches_collapse = False

    def examine(self, data: Any) -> list[Finding]:
        """What the doctor says of it.

        Raises:
            UserError: The data is of another class than datamodules.PackedMemory.
        """
        data = packed_memory(data, self)
        if not data.val_splits:
            return [
                Finding("run", "monitor", "no split in data.val_splits: training packs alone are watched", "warning",
                        "name one, so that recall is held against the untrained router's")
            ]  # fmt: skip
        if 1 <= data.packing.queries_per_pack < DISTINCT:
            return [
                Finding("run", "monitor", f"data.queries_per_pack {data.packing.queries_per_pack:g}: a pack of so few "
                        "queries looks diverse however they are routed", "warning",
                        f"give {DISTINCT} or more, or watch recall on held-out queries alone")
            ]  # fmt: skip
        return [Finding("run", "monitor", f"every routed layer, on training packs and {', '.join(data.val_splits)}")]

    def state_dict(self) -> dict[str, Any]:
        """What was seen, and said, outlives a resume."""
        return {"history": self.history, "low": self.low, "told": self.told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        self.history, self.low, self.told = state["history"], state["low"], state["told"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validates before the first step."""
        if not trainer.enable_validation or trainer.val_dataloaders is None:
            return
        data, module = parts(trainer, pl_module, self)
        if trainer.global_step == 0:
            self._learn(trainer, self._validate(trainer, module, data.val_splits))
        elif not self.history and trainer.is_global_zero:
            warnings.warn(
                "RouterMonitor: the checkpoint knows of no validation before training, so recall is held against "
                "nothing. Compare with the curves of routing/recall@1.",
                stacklevel=2,
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: MemoryPack, batch_idx: int
    ) -> None:
        """Looks at training packs at the logging interval."""
        assert isinstance(pl_module, MemorySparseModule)
        if not pl_module.logs_after(batch_idx) or trainer.global_step < self.settle:
            return
        # callbacks come before the module, which finds what is worked out here
        diversity = _by_layer(pl_module.training_routing.compute(), "diversity")
        for layer, value in diversity.items():
            self.low[layer] = self.low.get(layer, 0) + 1 if value < COLLAPSED else 0
        lost = {layer: diversity[layer] for layer, times in self.low.items() if times >= self.patience}
        self._tell_collapse(trainer, lost, f"on training packs, at {self.patience} logging steps in a row")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes down what the validation found, draws it and looks at it."""
        assert isinstance(pl_module, MemorySparseModule)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._learn(trainer, pl_module.held_out_values)

    def _validate(
        self, trainer: L.Trainer, module: MemorySparseModule, splits: Sequence[str]
    ) -> dict[str, dict[str, Tensor]]:
        """What a validation would find now: its packs, in the module's own step, without its logs and hooks."""
        found = {}
        with undisturbed(trainer, module):
            module.on_validation_epoch_start()
            loaders: Any = trainer.val_dataloaders
            for number, (split, limit, loader) in enumerate(zip(splits, trainer.num_val_batches, loaders, strict=True)):
                for index, pack in enumerate(islice(loader, int(limit))):
                    module.validation_step(pack.to(module.device), index, number)
                found[split] = module.held_out[number].compute()
            module.on_validation_epoch_start()
        return found

    def _learn(self, trainer: L.Trainer, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        step = trainer.global_step
        for split, values in found.items():
            rows = self.history.setdefault(split, [])
            rows.append({"step": step, **{measure: _by_layer(values, measure) for measure in MEASURES}})
            for logger in trainer.loggers if trainer.is_global_zero else ():
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(f"routing/layers/{split}", draw(rows, split), step)
            if step >= max(self.settle, 1):
                diversity = rows[-1]["diversity"]
                lost = {layer: value for layer, value in diversity.items() if value < COLLAPSED}
                self._tell_collapse(trainer, lost, f"on held-out queries of '{split}'")
            self._tell_fall(trainer, split, rows)

    def _tell_collapse(self, trainer: L.Trainer, lost: Row, where: str) -> None:
        layers = self._news("collapse", lost)
        if layers and trainer.is_global_zero:
            words = ", ".join(f"{_name(layer)} (diversity {lost[layer]:.2f})" for layer in layers)
            warnings.warn(
                f"step {trainer.global_step}: the router has collapsed in {words}, {where}: it sends nearly all "
                f"queries to the same documents; 1 is healthy. {MEND}",
                stacklevel=2,
            )

    def _tell_fall(self, trainer: L.Trainer, split: str, rows: Sequence[dict[str, Any]]) -> None:
        if rows[0]["step"] != 0:
            return
        before, now = rows[0]["recall@1"], rows[-1]["recall@1"]
        layers = self._news("fall", {layer: now[layer] for layer in now if now[layer] < before[layer] - self.slack})
        if layers and trainer.is_global_zero:
            words = ", ".join(f"{_name(layer)} {before[layer]:.3f} -> {now[layer]:.3f}" for layer in layers)
            warnings.warn(
                f"step {trainer.global_step}: the router finds less than before training: recall@1 of '{split}' in "
                f"{words}. Try a lower router_lr, a higher routing_weight, mined negatives, or router_init aligned.",
                stacklevel=2,
            )

    def _news(self, kind: str, layers: Row) -> list[str]:
        """Those that this was not told of yet; now it is."""
        news = [layer for layer in layers if layer not in self.told[kind]]
        self.told[kind] = [*self.told[kind], *news]
        return news


def draw(rows: Sequence[Mapping[str, Any]], split: str) -> Figure:
    """Heat maps of every measure: layers from the bottom up, overall on top, validations from left to right.

    Args:
        rows: A split's validations: `step`, and every measure by layer.
        split: Its name.
    """
    figure = Figure(figsize=(15, 2.6 + 0.36 * len(rows[0]["recall@1"])), layout="constrained")
    figure.suptitle(f"Held-out queries of '{split}', by routed layer")
    layers = list(rows[0]["recall@1"])
    every = -(-len(rows) // 8)  # no more labels than fit
    for axes, (measure, colours) in zip(figure.subplots(2, 3).flat, MEASURES.items(), strict=True):
        cells = [[row[measure][layer] for row in rows] for layer in layers]
        far = max(1e-6, *(abs(cell) for line in cells for cell in line))
        low, high = (-far, far) if colours == "RdBu" else (0.0, 1.0)  # a margin is of either sign, the rest are shares
        image = axes.imshow(
            cells, vmin=low, vmax=high, cmap=colours, aspect="auto", origin="lower", interpolation="nearest"
        )
        axes.axhline(len(layers) - 1.5, color="white", linewidth=2)
        axes.set_xticks(range(0, len(rows), every), [str(row["step"]) for row in rows[::every]])
        axes.set_yticks(range(len(layers)), layers)
        axes.set(title=measure, xlabel="step", ylabel="layer")
        figure.colorbar(image, ax=axes)
    return figure


def _by_layer(values: Mapping[str, Tensor], measure: str) -> Row:
    """A measure of every routed layer, and overall."""
    rows = {
        name.removeprefix("layer_").partition("/")[0]: float(value)
        for name, value in values.items()
        if name.endswith(f"/{measure}")
    }
    return {**rows, OVERALL: float(values[measure])}


def _name(layer: str) -> str:
    return "all layers together" if layer == OVERALL else f"layer {layer}"
