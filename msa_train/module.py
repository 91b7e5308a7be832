"""MemorySparseModule: joint training of routing and generation as a LightningModule.

One shared step for training and validation: run the pack, sum both losses, divide by the counts of the whole
optimiser step (losses.global_mean). Phases follow from the global step (phases.py). Nothing in a step waits for the
device: metrics accumulate there and are read when they are logged.

Tags (docs/architecture.md): `loss/*`, `train/*` from training; `routing/{metric}/{split}` and `loss/lm/{split}` from
held-out queries, routed over their whole pack.
"""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from msa_train.blueprint import Blueprint, Weights
from msa_train.checkpoints import PREFIX, read_checkpoint
from msa_train.config import MSAConfig
from msa_train.errors import UserError
from msa_train.kernels.choice import Kernels
from msa_train.lora import ADAPTER, LoRA
from msa_train.losses import RoutingLoss, global_mean, routing_loss
from msa_train.metrics import LossMeans, RoutingMetrics
from msa_train.model import MemorySparseModel, Output, Recompute
from msa_train.optimizer_state import plain_state_dict
from msa_train.pack import MemoryPack
from msa_train.phases import Group, Phase, Timeline
from msa_train.protocol import RoutingWords
from msa_train.routing import select_documents
from msa_train.strategies import ZeRO

COLLAPSED = 0.25  # of RoutingMetrics' diversity: trained routers measure 0.9 and more, collapsed ones 0.1 and less
SETTLED = 50  # steps after which a router that still sends all queries to one place is not just starting
TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16}  # trainer.precision that converts the weights
COPIES = "model.weights float32 with precision bf16-mixed, or msa_train.strategies.ZeRO, which keeps the copy"
MEND = "Compare with the untrained router, try router_init aligned, a lower router_lr, or more queries per pack."


class MemorySparseModule(L.LightningModule):
    """Trains a memory-sparse decoder.

    Args:
        backbone: Folder or hub name of a Hugging Face decoder; or a config.json for random weights of that shape.
        phases: What to optimise, in order; the run's length is the sum of their steps.
        msa: The memory's sizes.
        routing_words: Which words choose documents: those of the user's `question`, or of the `prompt` around it too.
        routing_loss: `decoupled` (the paper's), `coupled` or `focal`.
        temperature: Of the routing loss.
        weight_decay: On matrices; norms, biases and embeddings have none.
        betas: AdamW's.
        init_from: Checkpoint whose weights to start from, or a folder of routers alone, which are then those to start
            from; adapters beside them go on in a run with the same `lora`, and are merged in one without. Unlike
            --ckpt_path, steps and optimiser start anew.
        kernels: Which implementations to run, where there are several.
        recompute: What is computed again in the backward pass to save memory: `layers` what happens within each layer,
            `documents` all of the documents, 8,192 tokens at a time, for packs longer than memory holds.
        kept_layers: With `layers`, how many of the last ones keep what they computed: faster, as far as memory goes.
        weights: Precision of the weights.
        lora: Adapters to train in the place of the backbone's own weights (needs peft); none by default.
    """

    def __init__(
        self,
        backbone: str,
        phases: list[Phase],
        msa: MSAConfig = MSAConfig(),
        routing_words: RoutingWords = "question",
        routing_loss: RoutingLoss = "decoupled",
        temperature: float = 0.1,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        init_from: str | None = None,
        kernels: Kernels = Kernels(),
        recompute: Recompute = "none",
        kept_layers: int = 0,
        weights: Weights = "float32",
        lora: LoRA | None = None,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"model.temperature is {temperature}: give a positive number (the paper: 0.1)")
        self.timeline = Timeline(tuple(phases))
        self.msa = msa
        self.blueprint = Blueprint(backbone, msa, kernels, recompute, kept_layers, weights, lora)
        self.routing_words: RoutingWords = routing_words
        self.loss_kind: RoutingLoss = routing_loss
        self.temperature, self.weight_decay, self.betas = temperature, weight_decay, betas
        self.init_from = init_from
        self.model: MemorySparseModel | None = None
        self.watches_collapse = True  # until a callback does, that knows the layers apart
        self._collapse_told = False
        self._skipped = torch.zeros((), dtype=torch.float32)
        self._broken: list[tuple[int, Tensor]] = []  # steps since the last look, and whether they were skipped
        self._seed: int | None = None
        self._pack = ""
        self._backbone_trains: bool | None = None  # as the last step had it
        self.validate_first = False  # whether the validation of the step that is saved is to come
        self._resuming = False
        self._evaluated: str | None = None
        self._loaded_step = 0
        self.layer_recall: dict[int, float] = {}
        self.held_out_values: dict[str, dict[str, Tensor]] = {}

    # --- building -----------------------------------------------------------------------------------------------

    def preflight(self, tokens: int | None, checkpoint: Path | None) -> None:
        """Builds the model on no device and holds it against the weights to be loaded: an error here costs nothing.

        Args:
            tokens: Size of the tokenizer, if there is one.
            checkpoint: Checkpoint to resume from; `init_from` is looked at otherwise.

        Raises:
            UserError: The backbone cannot be opened or routed, or the checkpoint is of another architecture.
        """
        self._resuming = checkpoint is not None
        if self.init_from is not None and not self._resuming and not Path(self.init_from).exists():
            raise UserError(f"model.init_from: no such checkpoint '{self.init_from}'")
        source = checkpoint or (Path(self.init_from) if self.init_from else None)
        self.blueprint.check(source, self._resuming, tokens)

    def open_for_evaluation(self, checkpoint: Path) -> None:
        """Has the model built with a checkpoint's weights, without Lightning's help: for evaluation, not resuming."""
        self._evaluated = str(checkpoint)

    def configure_model(self) -> None:
        """Opens the backbone and attaches routers, once."""
        if self.model is not None:
            return
        strategy = self._strategy()
        start = self._evaluated or (None if self._resuming else self.init_from)
        if isinstance(strategy, ZeRO) and strategy.stage == 3:
            self.model = self.blueprint.blank(self._tokens())
            strategy.shard(self.model, self._started(start) if self.trainer.is_global_zero else None)
        else:
            self.model = self._started(start)
        layers, k = self.model.routed_layers, self.msa.top_k
        splits = self._splits()
        self.held_out: Any = torch.nn.ModuleList([RoutingMetrics(layers, k) for _ in splits])
        self.held_out_loss: Any = torch.nn.ModuleList([LossMeans() for _ in splits])
        self.training_routing = RoutingMetrics(layers, k)
        self.training_loss = LossMeans()
        if all(phase.trainable == "routers" for phase in self.timeline.phases):
            for _, weight in self.model.backbone_parameters():
                weight.requires_grad_(False)
        if self._evaluated is not None:
            self._loaded_step = read_checkpoint(Path(self._evaluated))["global_step"]

    def _started(self, start: str | None) -> MemorySparseModel:
        return self.blueprint.started(start, self.seed, self._tokens())

    def untrained(self) -> MemorySparseModel:
        """The model as it is before all training, on the CPU."""
        return self.blueprint.untrained(self.seed, self._tokens())

    def check_strategy(self, strategy: Any, fitting: bool) -> None:
        """Checks what the strategy can run.

        Args:
            strategy: The trainer's.
            fitting: Whether it trains.

        Raises:
            UserError: It cannot run the phases, or is DeepSpeed's without this project's checkpoints.
        """
        if isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, ZeRO):
            raise UserError(
                "trainer.strategy is Lightning's DeepSpeed: give msa_train.strategies.ZeRO (docs/scaling.md)"
            )
        if isinstance(strategy, ZeRO) and strategy.stage == 3 and self.blueprint.recompute == "documents":
            raise UserError(
                "model.recompute documents under ZeRO stage 3: packs differ in their number of parts, and ranks would "
                "wait for each other's weights for ever; take stage 2, or recompute layers"
            )
        if fitting and isinstance(strategy, ZeRO) and self.timeline.freezes_for_a_while:
            raise UserError(
                "model.phases freeze the backbone in some phases only, which ZeRO cannot: train the routers in a run "
                "of their own, and start the next from it with --model.init_from"
            )

    def setup(self, stage: str) -> None:
        """Keeps Lightning from converting packs: for bf16-true it would look for floats in them, where there are none,
        and refuses to look into a frozen dataclass. Nor may it convert buffers: RoPE's frequencies in bfloat16 turn the
        far end of a long document by radians."""
        self.check_strategy(self.trainer.strategy, stage == "fit")
        plugin: Any = self.trainer.precision_plugin
        plugin.convert_input = _as_it_is
        if plugin.precision in TRUE:
            plugin.convert_module = partial(_convert_weights, dtype=TRUE[plugin.precision])

    @property
    def net(self) -> MemorySparseModel:
        """The model, once it is built."""
        assert self.model is not None, "configure_model has not run"
        return self.model

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over named groups, each weight in exactly one; every step sets their rates anew."""
        return SkippingAdamW(parameter_groups(self.net, self.weight_decay), betas=self.betas, fused=True)

    # --- training -----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Checks what only the trainer knows."""
        mixed = self.timeline.freezes_for_a_while
        strategy = self.trainer.strategy
        unused_allowed = getattr(strategy, "_ddp_kwargs", {"find_unused_parameters": True})
        if mixed and not unused_allowed.get("find_unused_parameters", False):
            raise UserError(
                "model.phases freeze the backbone in some phases only: DDP needs "
                "--trainer.strategy ddp_find_unused_parameters_true for that"
            )
        self._skipped = self._skipped.to(self.device)
        lost = None if isinstance(strategy, ZeRO) else self.lost_updates(str(self.trainer.precision))
        if lost is not None:
            warnings.warn(f"{lost}. Use {COPIES}.", stacklevel=2)

    def lost_updates(self, precision: str) -> str | None:
        """What is wrong with training bfloat16 weights that have no float32 copy; None where nothing is.

        Args:
            precision: The trainer's.
        """
        trained = [phase for phase in self.timeline.phases if phase.trainable == "all" and phase.backbone_lr > 0]
        lowest = min((phase.learning_rate(phase.steps - 1, "backbone") for phase in trained), default=1.0)
        if lowest >= 1e-4 or (self.blueprint.weights != "bfloat16" and precision != "bf16-true"):
            return None
        return (
            f"weights are bfloat16 without a float32 copy, and the backbone's rate falls to {lowest:.1e}: most updates "
            "are smaller than bfloat16 can hold and are lost"
        )

    def on_train_start(self) -> None:
        """Lightning never calls train(), and from_pretrained leaves eval mode on (Lightning issue 20105)."""
        self.train()

    @property
    def seed(self) -> int:
        """The run's, as seed_everything left it; torch's own is that of the last step."""
        if self._seed is None:
            self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
        return self._seed

    def on_train_batch_start(self, batch: MemoryPack, batch_idx: int) -> None:
        """Freezes or frees the backbone as the phase says, and sets the rates. They follow from the step, and what it
        draws from seed, place and rank, as its packs do: a resumed run needs no memory of either."""
        torch.manual_seed(self.seed + 1 + batch_idx * self.trainer.world_size + self.trainer.global_rank)
        _, phase, _ = self.timeline.at(self.global_step)
        wanted = phase.trainable == "all"
        if wanted != self._backbone_trains:  # to walk through all names takes a while
            for name, weight in self.net.backbone_parameters():
                if self.blueprint.lora is None or ADAPTER in name:
                    weight.requires_grad_(wanted)
            self._backbone_trains = wanted
        for group in self.trainer.optimizers[0].param_groups:
            kind: Group = "routers" if group["name"] == "routers" else "backbone"
            group["lr"] = self.timeline.learning_rate(self.global_step, kind)
        # a resumed run may begin with a validation, which is logged with the step before it
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.global_step

    def training_step(self, pack: MemoryPack, batch_idx: int) -> Tensor:
        """The weighted sum of both losses of one pack, as its share of the global batch."""
        _, phase, _ = self.timeline.at(self.global_step)
        self._pack = pack.describe()
        pack.check_counts()
        output, lm_sum, routing_sum = self._losses(pack, phase)
        world, accumulated = self.trainer.world_size, self.trainer.accumulate_grad_batches
        lm = global_mean(lm_sum, pack.step_labels, world, accumulated)
        routing = global_mean(routing_sum, pack.step_queries, world, accumulated)
        total = phase.lm_weight * lm + phase.routing_weight * routing
        total = total * torch.where(torch.isfinite(total.detach()), 1.0, torch.nan)  # nor is any rank's gradient then
        self.training_loss.update(lm_sum.detach(), len(pack.contexts.label_target_N), routing_sum.detach(), pack.asked)
        self.training_routing.update(output.doc_score_LQD.detach(), output.selected_LQK, pack.positive_QD)
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measures the gradient and keeps a non-finite one from the weights, without a look at the device."""
        if isinstance(self.trainer.strategy, ZeRO):  # it does both by itself, in the step that follows
            return
        weights = (weight for group in optimizer.param_groups for weight in group["params"])
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        broken = (~torch.isfinite(norm)).float()
        optimizer.found_inf = broken  # type: ignore[attr-defined]
        self._skipped = self._skipped + broken
        self._broken.append((self.global_step, broken))
        self.log("train/grad_norm", norm, batch_size=1)
        self.log("train/skipped_steps", self._skipped, batch_size=1)

    def on_train_batch_end(self, outputs: Any, batch: MemoryPack, batch_idx: int) -> None:
        """Reads the running training metrics at the logging interval."""
        if self.logs_after(batch_idx):
            number, phase, within = self.timeline.at(self.global_step - 1)
            loss, values = self.training_loss.compute(), self.training_routing.compute()
            self.training_loss.reset()
            self.training_routing.reset()
            total = phase.lm_weight * loss["lm"] + phase.routing_weight * loss["routing"]
            for name, value in (("total", total), *loss.items()):
                self.log(f"loss/{name}", value, batch_size=1)
            for name in ("recall@1", "recall@k", "diversity"):
                self.log(f"train/{name}", values[name], batch_size=1, prog_bar=name == "recall@1")
            self.log("train/lr", phase.learning_rate(within, "routers"), batch_size=1)
            self.log("train/phase", float(number), batch_size=1)
            strategy = self.trainer.strategy
            if isinstance(strategy, ZeRO):
                self.log("train/grad_norm", strategy.gradient_norm, batch_size=1)
                self.log("train/skipped_steps", float(strategy.skipped_steps), batch_size=1)
            if self.global_step >= SETTLED:
                self._watch_collapse(float(values["diversity"]), float(values["hubness"]), "training packs")

    def take_skipped(self) -> list[int]:
        """The steps that were skipped since this was last asked; waits for the device."""
        broken, self._broken = self._broken, []
        strategy = self.trainer.strategy
        if isinstance(strategy, ZeRO):
            return strategy.take_skipped()
        flags = torch.stack([flag for _, flag in broken]).tolist() if broken else []
        return [step for (step, _), flag in zip(broken, flags, strict=True) if flag]

    @property
    def skipped_steps(self) -> int:
        """Steps of the run without a finite gradient; waits for the device."""
        strategy = self.trainer.strategy
        return strategy.skipped_steps if isinstance(strategy, ZeRO) else int(self._skipped)

    def out_of_memory(self) -> str:
        """What was being done when memory ran out, and what takes less."""
        less = {
            "none": "set model.recompute layers, ",
            "layers": "lower model.kept_layers, set model.recompute documents, ",
        }.get(self.blueprint.recompute, "")
        return (
            f"out of memory at step {self.steps_done()}, in {self._pack or 'no pack'}: {less}lower "
            "data.document_tokens or data.queries_per_pack, or share more out over GPUs (docs/scaling.md); `msa-train "
            "estimate` says what fits"
        )

    def logs_after(self, batch_idx: int) -> bool:
        """Whether a pack ended an optimiser step at the logging interval."""
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return stepped and every > 0 and self.global_step % every == 0

    # --- evaluation ---------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Starts the held-out metrics afresh."""
        for metric in (*self.held_out, *self.held_out_loss):
            metric.reset()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, pack: MemoryPack, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Routes held-out queries over their whole pack."""
        output, lm_sum, routing_sum = self._losses(pack, self._phase_measured())
        if pack.counted:
            labels = len(pack.contexts.label_target_N)
            self.held_out[dataloader_idx].update(output.doc_score_LQD, output.selected_LQK, pack.positive_QD)
            self.held_out_loss[dataloader_idx].update(lm_sum, labels, routing_sum, pack.asked)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Logs every split, keeps how well each layer routes, and warns once when the router has collapsed."""
        found = [metric.compute() for metric in self.held_out]
        self.held_out_values = dict(zip(self._splits(), found, strict=True))
        self.layer_recall = {
            layer: sum(float(values[f"layer_{layer}/recall@1"]) for values in found) / len(found)
            for layer in self.net.routed_layers
            if found
        }
        for number, (split, values) in enumerate(zip(self._splits(), found, strict=True)):
            for name, value in values.items():
                self.log(f"routing/{name}/{split}", value)
            for name, value in self.held_out_loss[number].compute().items():
                self.log(f"loss/{name}/{split}", value)
            if self.steps_done() > 0:
                self._watch_collapse(float(values["diversity"]), float(values["hubness"]), f"split '{split}'")

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, pack: MemoryPack, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Ranks the pack's documents for each of its queries."""
        score_QD = self.net(pack).doc_score_LQD.mean(0)
        best_QK = select_documents(score_QD, self.msa.top_k)
        rankings = []
        for row in pack.positive_QD.any(1).nonzero().flatten().tolist() if pack.counted else ():
            places = [place for place in best_QK[row].tolist() if place >= 0]
            wanted = pack.positive_QD[row].nonzero().flatten().tolist()
            rankings.append(
                {
                    "query": pack.query_ids[row],
                    "documents": [pack.document_ids[place] for place in places],
                    "scores": score_QD[row, places].tolist(),
                    "positives": [pack.document_ids[place] for place in wanted],
                }
            )
        return rankings

    # --- checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the weights do not tell, the counter, and what every rank has added up since the last log."""
        strategy = self.trainer.strategy
        told: list[Any] = [
            {name: {state: value.cpu() for state, value in metric.metric_state.items()}
             for name, metric in self._running().items()}
        ]  # fmt: skip
        if self.trainer.world_size > 1:
            told *= self.trainer.world_size
            torch.distributed.all_gather_object(told, told[0])
        checkpoint["running"] = told
        checkpoint["msa_train"] = {
            "chunk_size": self.msa.chunk_size,
            "skipped_steps": float(self.skipped_steps),
            "packs_per_step": packs_per_step(self.trainer, getattr(self.trainer, "datamodule", None)),
            "validate_first": self.validate_first,
            "strategy": f"ZeRO stage {strategy.stage}" if isinstance(strategy, ZeRO) else type(strategy).__name__,
            "ranks": self.trainer.world_size,
            "lora": None if self.blueprint.lora is None else self.blueprint.lora.facts,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counts on from where the run was."""
        self._skipped = torch.tensor(checkpoint["msa_train"]["skipped_steps"], dtype=torch.float32)
        self._loaded_step = checkpoint["global_step"]
        reader = checkpoint.pop("reader", None)
        if reader is not None:
            groups = self.configure_optimizers().param_groups
            checkpoint["optimizer_states"] = [plain_state_dict(reader.tensor, checkpoint.pop("optimizer"), groups)]
        told = checkpoint.pop("running", [])
        for rank in range(self.trainer.global_rank, len(told), self.trainer.world_size):  # of more ranks than there are
            for name, metric in self._running().items():
                for state, value in told[rank][name].items():
                    setattr(metric, state, getattr(metric, state) + value.to(metric.device))
        _recount(checkpoint, self.trainer.accumulate_grad_batches)

    # --- helpers ------------------------------------------------------------------------------------------------

    def _running(self) -> dict[str, Any]:
        return {"loss": self.training_loss, "routing": self.training_routing}

    def _losses(self, pack: MemoryPack, phase: Phase) -> tuple[Output, Tensor, Tensor]:
        output = self.net(pack, phase.top_k or None)
        lm_sum = self.net.label_loss(output, pack.contexts)
        per_query = routing_loss(output.doc_score_LQD, pack.positive_QD, self.temperature, self.loss_kind)
        return output, lm_sum, per_query.mean(0).sum()

    def _phase_measured(self) -> Phase:
        """The phase that held-out packs are read in: that of the last step; weights to be evaluated that know no step,
        as those of an exported folder do, are read as at the run's end."""
        step = self.steps_done()
        if step == 0 and self.trainer.state.fn != "fit":
            return self.timeline.phases[-1]
        return self.timeline.at(max(step - 1, 0))[1]

    def _watch_collapse(self, diversity: float, hubness: float, where: str) -> None:
        if diversity < COLLAPSED and self.watches_collapse and not self._collapse_told:
            self._collapse_told = True
            if self.trainer.is_global_zero:
                warnings.warn(
                    f"the router has collapsed: on {where} the most popular document wins {hubness:.0%} of the queries "
                    f"(diversity {diversity:.2f}; 1 is healthy). {MEND}",
                    stacklevel=2,
                )

    def steps_done(self) -> int:
        """Steps that the weights were trained for, in a run that trains and in one that evaluates a checkpoint."""
        # Lightning restores the step for fitting alone
        return max(self.global_step, self._loaded_step)

    def _strategy(self) -> Any:
        return self._trainer.strategy if self._trainer is not None else None

    def _tokens(self) -> int | None:
        """Size of the data's tokenizer, if there is one."""
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        tokenizer = getattr(data, "tokenizer", None)
        return None if tokenizer is None else len(tokenizer)

    def _splits(self) -> tuple[str, ...]:
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        return tuple(getattr(data, "val_splits", ("test",)))


def packs_per_step(trainer: L.Trainer, data: Any) -> int:
    """Packs of an optimiser step, over all ranks.

    Args:
        trainer: Whose ranks.
        data: The data module; None for one rank to a pack.
    """
    return trainer.world_size * trainer.accumulate_grad_batches // getattr(data, "document_parallel", 1)


def _recount(checkpoint: dict[str, Any], accumulated: int) -> None:
    """Has Lightning's loop stand where it stood, in the middle of its one endless epoch, counted in this run's batches:
    another number of ranks takes as many packs a step, in another number of batches.

    Lightning tells from these counts what was going on when it was saved: a validation that has begun is begun anew,
    if it is time; else the next step begins.
    """
    step, loop = checkpoint["global_step"], checkpoint["loops"]["fit_loop"]
    epoch, batches, held_out = (
        loop[name] for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress")
    )
    for counts in (epoch["total"], epoch["current"]):
        counts.update(ready=1, started=1, processed=0, completed=0)
    for counts in (batches["total"], batches["current"]):
        done = step * accumulated
        counts.update(ready=done, started=done, processed=done, completed=done)
    begun = int(checkpoint["msa_train"]["validate_first"])
    for counts in (held_out["total"], held_out["current"]):
        counts.update(ready=begun, started=begun, processed=0, completed=0)
    batches["is_last_batch"] = held_out["is_last_batch"] = False
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - begun  # a validation is logged with its step


def _as_it_is(data: Any) -> Any:
    return data


def _convert_weights(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for weight in module.parameters():
        weight.data = weight.data.to(dtype)
    return module


class SkippingAdamW(torch.optim.AdamW):
    """AdamW whose fused kernels leave weights, moments and step as they are where `found_inf` is 1: on the device,
    without the host looking."""

    grad_scale = None
    # Lightning takes a fused optimiser for one that unscales float16 gradients itself, and then refuses to clip
    _step_supports_amp_scaling = property(lambda self: False, lambda self, value: None)


def parameter_groups(model: MemorySparseModel, weight_decay: float) -> list[dict[str, Any]]:
    """Named optimiser groups: routers, backbone, backbone without decay. Every trainable weight is in exactly one."""
    backbone = [(PREFIX + name, weight) for name, weight in model.backbone_parameters() if weight.requires_grad]
    routers = [(PREFIX + name, weight) for name, weight in model.router_parameters()]
    # a weight that stage 3 has shared out is flat, and remembers its shape
    matrices = {name for name, weight in backbone if len(getattr(weight, "ds_shape", weight.shape)) >= 2}
    decayed = [(name, weight) for name, weight in backbone if name in matrices and "embed" not in name]
    others = [(name, weight) for name, weight in backbone if name not in matrices or "embed" in name]
    groups = [
        {"name": "routers", "params": routers, "weight_decay": 0.0},
        {"name": "backbone", "params": decayed, "weight_decay": weight_decay},
        {"name": "backbone_no_decay", "params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
