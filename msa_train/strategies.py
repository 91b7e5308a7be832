"""ZeRO: DeepSpeed's sharing out of optimiser, gradients and weights over the ranks; and checkpoints of all strategies.

The invariant: a checkpoint holds names and complete tensors (folders.py), nothing of who had which part. So it opens
without DeepSpeed, nothing of it is unpickled, and a run goes on from it with other ranks, stages and strategies.
Gradients are means over ranks and accumulated packs, as those of DDP are.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins.io import CheckpointIO
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from msa_train.errors import UserError
from msa_train.folder_files import FolderReader, FolderWriter
from msa_train.folders import ASIDE, discard
from msa_train.optimizer_state import plain_state, restore_zero_state, zero_state, zero_steps

INSTALL = "pip install 'msa-train[deepspeed]', once torch is there"
PRECISIONS = ("bf16-true", "bf16-mixed")  # the same to DeepSpeed: it trains bfloat16 with a float32 copy
GRADIENTS = {"float32": "fp32", "bfloat16": "bf16"}


class ZeRO(DeepSpeedStrategy):
    """Data parallel training whose ranks share what DDP repeats on each of them. docs/scaling.md says which when.

    Weights are bfloat16, with a float32 copy and AdamW's moments shared out. Set precision bf16-true.

    Args:
        stage: What is shared out: 1 the optimiser, 2 gradients as well, 3 weights as well.
        offload_optimizer: Keep the optimiser in the host's memory and step there, with torch's own fused AdamW: nothing
            is compiled.
        offload_parameters: Keep the ranks' parts of the weights there too; stage 3 alone.
        gradients: Precision in which gradients add up over accumulated packs. float32 takes 4 bytes a weight, on every
            rank in stage 1, shared out in stages 2 and 3.
        reduce_bucket_size: Weights whose gradients are averaged at a time; two such buffers of 2 bytes a weight (4 in
            stage 1) are held.
        allgather_bucket_size: Weights gathered at a time after a step, in stages 1 and 2.
        prefetch_bucket_size: Weights gathered ahead of their use, in stage 3; 2 bytes each.
        max_live_parameters: Weights that a rank keeps gathered at most, in stage 3; 2 bytes each.
        persistence_threshold: Smaller weights stay whole on every rank, in stage 3.
        timeout_minutes: How long a rank waits for the others.

    Raises:
        UserError: DeepSpeed is missing, or the arguments contradict each other.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        gradients: Literal["float32", "bfloat16"] = "float32",
        reduce_bucket_size: int = 200_000_000,
        allgather_bucket_size: int = 200_000_000,
        prefetch_bucket_size: int = 50_000_000,
        max_live_parameters: int = 1_000_000_000,
        persistence_threshold: int = 100_000,
        timeout_minutes: float = 30.0,
    ) -> None:
        check_arguments(stage, offload_parameters)
        cuda = torch.cuda.is_available()
        if not cuda:  # before deepspeed is imported, which looks once
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        host = {"device": "cpu", "pin_memory": cuda}
        zero: dict[str, Any] = {
            "stage": stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": reduce_bucket_size,
            "allgather_bucket_size": allgather_bucket_size,
            "stage3_prefetch_bucket_size": prefetch_bucket_size,
            "stage3_max_live_parameters": max_live_parameters,
            "stage3_max_reuse_distance": max_live_parameters,
            "stage3_param_persistence_threshold": persistence_threshold,
            **({"offload_optimizer": host} if offload_optimizer else {}),
            **({"offload_param": host} if offload_parameters else {}),
        }
        super().__init__(
            timeout=timedelta(minutes=timeout_minutes),
            config={
                "train_micro_batch_size_per_gpu": 1,  # a pack
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # it would be compiled at the first step
                "data_types": {"grad_accum_dtype": GRADIENTS[gradients]},
                "zero_optimization": zero,
            },
        )
        self.stage = stage
        self._skipped: list[int] = []

    # --- starting -----------------------------------------------------------------------------------------------

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    @property
    def root_device(self) -> torch.device:
        """The rank's device; DeepSpeed wants an index with it."""
        return torch.device("cpu", self.local_rank) if self._on_cpu else super().root_device

    def setup_environment(self) -> None:
        """Lightning's, which refuses CPUs; DeepSpeed does not.

        Raises:
            UserError: Precision or accelerator is one that DeepSpeed does not run with.
        """
        precision = self.precision_plugin.precision
        if precision not in PRECISIONS:
            raise UserError(f"ZeRO trains bfloat16 weights: trainer.precision is {precision}, give bf16-true")
        from deepspeed.accelerator import get_accelerator

        if self._on_cpu != (get_accelerator().device_name() == "cpu"):
            raise UserError("ZeRO on the CPU of a machine with GPUs: set DS_ACCELERATOR=cpu before msa-train")
        if self._on_cpu:
            DDPStrategy.setup_environment(self)
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        """Lightning's, which looks for GPUs with the ranks' numbers."""
        if not self._on_cpu:
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def setup(self, trainer: L.Trainer) -> None:
        """Places what DeepSpeed leaves where it is under stage 3: buffers and metrics."""
        assert self.lightning_module is not None
        self.lightning_module.to(self.root_device)
        super().setup(trainer)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Nothing: the module shares its weights out by itself, from one complete copy."""
        yield

    def shard(self, blank: nn.Module, complete: nn.Module | None) -> None:
        """Gives every rank its part of a model that the first rank alone has.

        Args:
            blank: The model on no device; it is given the weights.
            complete: The same with its weights; on the first rank, None on all others.
        """
        import deepspeed

        self._init_config_if_needed()
        held = {} if complete is None else _tensors(complete)

        def share(name: str, tensor: Tensor) -> Tensor:
            weight = isinstance(tensor, nn.Parameter)
            dtype = torch.bfloat16 if weight and tensor.is_floating_point() else tensor.dtype
            real = torch.empty(tensor.shape, dtype=dtype, device=self.root_device)
            if complete is not None:
                real.copy_(held[name].detach())
            if not weight:
                torch.distributed.broadcast(real, 0)
                return real
            parameter = nn.Parameter(real, tensor.requires_grad)
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=self.config)
            return parameter

        _replace(blank, share)

    # --- training -----------------------------------------------------------------------------------------------

    def backward(
        self, closure_loss: Tensor, optimizer: torch.optim.Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Lightning has divided the loss by the accumulated packs already; DeepSpeed would once more."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @property
    def gradient_norm(self) -> float:
        """Norm of the last step's gradient before clipping, of all ranks; inf where it was not finite."""
        return float(self.deepspeed_engine.get_global_grad_norm())

    @property
    def skipped_steps(self) -> int:
        """Steps of the run whose gradient was not finite: DeepSpeed left the weights as they were."""
        return self.deepspeed_engine.skipped_steps

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's; remembers the step if DeepSpeed leaves it out."""
        assert self.lightning_module is not None
        before, step = self.skipped_steps, self.lightning_module.global_step
        done = super().optimizer_step(*args, **kwargs)
        if self.skipped_steps > before:
            self._skipped.append(step)
        return done

    def take_skipped(self) -> list[int]:
        """The steps that were left out since this was last asked."""
        skipped, self._skipped = self._skipped, []
        return skipped

    def teardown(self) -> None:
        """Lightning's, which would move the optimiser into the host's memory first: a minute at 4B, for nothing."""
        self.optimizers = []
        super().teardown()

    # --- checkpoints --------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Saves a folder (folders.py), by all ranks. What a disk refuses to any of them is a warning.

        Args:
            checkpoint: Lightning's state of the run.
            filepath: The folder.
            storage_options: Not used.
        """
        module, engine = self.lightning_module, self.deepspeed_engine
        assert module is not None
        folder = Path(self.broadcast(filepath))
        aside = folder.with_name(folder.name + ASIDE)
        writer = FolderWriter(aside)
        if self.is_global_zero:
            writer.start()
        self.barrier()
        facts = {**checkpoint["msa_train"], "global_step": checkpoint["global_step"]}
        weights, tied = {}, _tied(module)
        for name, weight in gathered(module):
            if self.is_global_zero:
                weights[name] = weight.to("cpu", copy=True).contiguous()
        if self.is_global_zero:
            writer.weights(weights, {**facts, "tied": tied})
            rest = {name: checkpoint[name] for name in checkpoint if name not in ("state_dict", "optimizer_states")}
            writer.trainer({**rest, "optimizer": zero_steps(module, engine)})
        weights.clear()
        for number, (name, tensor) in enumerate(zero_state(module, engine)):
            if number % self.world_size == self.global_rank:
                writer.optimizer(name, tensor, self.global_rank)
        writer.finish(self.global_rank)
        told: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(told, (writer.files, writer.refused))
        if self.is_global_zero:
            writer.files = {name: one for files, _ in told for name, one in files.items()}
            writer.refused = next((refused for _, refused in told if refused), None)
            writer.settle(folder)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Gives every rank its part of what any strategy saved, on whatever number of ranks."""
        module = self.lightning_module
        assert module is not None
        reader = FolderReader(Path(checkpoint_path))
        with torch.no_grad():
            for name, weight in gathered(module, modifier=0):
                weight.copy_(reader.weight(name))
        checkpoint = reader.trainer()
        restore_zero_state(module, self.deepspeed_engine, reader.tensor, checkpoint.pop("optimizer"))
        facts = checkpoint["msa_train"]
        engine, packs = self.deepspeed_engine, facts["packs_per_step"]
        engine.global_steps, engine.skipped_steps = checkpoint["global_step"], int(facts["skipped_steps"])
        engine.global_samples = checkpoint["global_step"] * packs
        return checkpoint


class FolderIO(CheckpointIO):
    """Checkpoints of all other strategies, by the first rank, in the same folders."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves a folder (folders.py). What a disk refuses is a warning."""
        folder, state = Path(path), checkpoint["state_dict"]
        writer = FolderWriter(folder.with_name(folder.name + ASIDE))
        writer.start()
        rest = {name: checkpoint[name] for name in checkpoint if name not in ("state_dict", "optimizer_states")}
        facts = {**checkpoint["msa_train"], "global_step": checkpoint["global_step"]}
        first: dict[tuple[Any, ...], str] = {}
        tied = {}
        for name, weight in state.items():
            same = first.setdefault((weight.data_ptr(), weight.shape, weight.stride()), name)
            if same != name:
                tied[name] = same
        weights = {name: weight.cpu().contiguous() for name, weight in state.items() if name not in tied}
        writer.weights(weights, {**facts, "tied": tied})
        tensors, steps = plain_state(checkpoint["optimizer_states"][0])
        for name, tensor in tensors.items():
            writer.optimizer(name, tensor, 0)
        writer.trainer({**rest, "optimizer": steps})
        writer.finish(0)
        writer.settle(folder)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What Lightning resumes from; the module makes an optimiser's state of it (`on_load_checkpoint`)."""
        reader = FolderReader(Path(path))
        return {**reader.trainer(), "state_dict": reader.weights(masters=True), "reader": reader}

    def remove_checkpoint(self, path: Any) -> None:
        """Deletes a checkpoint."""
        discard(Path(path))


def check_arguments(stage: int, offload_parameters: bool) -> None:
    """Checks what ZeRO is made of.

    Raises:
        UserError: DeepSpeed is missing, or the arguments contradict each other.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"msa_train.strategies.ZeRO needs deepspeed: {INSTALL}")
    if offload_parameters and stage != 3:
        raise UserError(f"ZeRO: offload_parameters needs stage 3, which shares weights out; stage is {stage}")


def zero_arguments(strategy: Any) -> Any:
    """ZeRO's arguments in a configuration of a strategy; None for another strategy."""
    given = strategy if hasattr(strategy, "get") else {}
    return (given.get("init_args") or {}) if given.get("class_path") == f"{__name__}.{ZeRO.__name__}" else None


def sharded(module: nn.Module) -> bool:
    """Whether stage 3 has shared a module's weights out."""
    return any(hasattr(weight, "ds_id") for weight in module.parameters())


def gathered(module: nn.Module, modifier: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight, complete, with its name, one at a time; tied ones once. All ranks must go through all of them.

    Args:
        module: Whose weights.
        modifier: Rank whose changes to them all ranks take.
    """
    for name, weight in module.named_parameters():
        if not hasattr(weight, "ds_id"):
            yield name, weight.data
            continue
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight], modifier_rank=modifier):
            yield name, weight.data


def complete(module: nn.Module, blank: nn.Module | None) -> None:
    """Fills a model with the weights that stage 3 has shared out. All ranks must call it.

    Args:
        module: The model that is shared out.
        blank: The same on no device; None on a rank that does not want it.
    """
    held = {name: buffer.detach().clone() for name, buffer in module.named_buffers() if blank is not None}
    for name, weight in gathered(module):
        if blank is not None:
            held[name] = weight.clone()
    if blank is not None:
        _replace(blank, lambda name, tensor: _like(held[name], tensor))


def _tied(module: nn.Module) -> dict[str, str]:
    """Second names of tied weights, with their first."""
    first: dict[int, str] = {}
    names = (
        (name, first.setdefault(id(weight), name)) for name, weight in module.named_parameters(remove_duplicate=False)
    )
    return {name: same for name, same in names if name != same}


def _like(held: Tensor, tensor: Tensor) -> Tensor:
    return nn.Parameter(held, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else held


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _replace(module: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Every weight and buffer of a module by what is made for it; tied ones stay tied."""
    made = {id(tensor): (tensor, make(name, tensor)) for name, tensor in _tensors(module).items()}
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    own[name] = made[id(tensor)][1]  # type: ignore[assignment]
