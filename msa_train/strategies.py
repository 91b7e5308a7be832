"""ZeRO: DeepSpeed's sharing out of optimiser, gradients and weights over the ranks, and its checkpoints.

    weights.safetensors    the weights, complete, in the precision of training
    msa_train.json         what they do not tell: chunk size, steps, and who saved them
    checkpoint/, latest    DeepSpeed's own parts, one for each rank, which resuming needs

The invariant: a checkpoint opens without DeepSpeed, and nothing of it is unpickled but by resuming it. It is written
aside and takes its place when it is whole. Gradients are means over ranks and accumulated packs, as those of DDP are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from safetensors.torch import save_file
from torch import Tensor, nn

from msa_train.errors import UserError

WEIGHTS, FACTS = "weights.safetensors", "msa_train.json"
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

    def teardown(self) -> None:
        """Lightning's, which would move the optimiser into the host's memory first: a minute at 4B, for nothing."""
        self.optimizers = []
        super().teardown()

    # --- checkpoints --------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Saves a folder, by all ranks; it replaces one of the same name with all that it holds.

        Args:
            checkpoint: Lightning's state of the run.
            filepath: The folder.
            storage_options: Not used.
        """
        path = Path(self.broadcast(filepath))
        aside = path.with_name(f"{path.name}.writing")
        if self.is_global_zero:
            _remove(aside)
        self.barrier()
        kept = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        self.deepspeed_engine.save_checkpoint(aside, client_state=kept, tag="checkpoint")
        self._save_weights(aside, {**checkpoint["msa_train"], "global_step": checkpoint["global_step"]})
        self.barrier()
        if self.is_global_zero:
            _put(aside, path)
        self.barrier()

    def _save_weights(self, folder: Path, facts: dict[str, Any]) -> None:
        module = self.lightning_module
        assert module is not None
        weights = {}
        for name, weight in gathered(module):
            if self.is_global_zero:
                weights[name] = weight.to("cpu", copy=True).contiguous()
        if self.is_global_zero:
            first: dict[int, str] = {}
            tied = {}
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if first.setdefault(id(parameter), name) != name:
                    tied[name] = first[id(parameter)]
            save_file(weights, folder / WEIGHTS, {"format": "pt"})
            facts = {**facts, "tied": tied, "stage": self.stage, "ranks": self.world_size}
            (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")


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


def gathered(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight, complete, with its name, one at a time; tied ones once. All ranks must go through all of them."""
    for name, weight in module.named_parameters():
        if not hasattr(weight, "ds_id"):
            yield name, weight.data
            continue
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
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


def _put(aside: Path, path: Path) -> None:
    """Moves a finished folder into its place. At every moment a whole one is named last*.ckpt, if the place is."""
    before = path.with_name(f"{path.stem}-before{path.suffix}")
    if path.exists():
        _discard(before)
        path.rename(before)
    aside.rename(path)
    _discard(before)


def _discard(path: Path) -> None:
    """Removes a checkpoint, which must not be taken for one while it is half deleted."""
    if path.exists():
        doomed = path.with_name(f"{path.name}.deleting")
        _remove(doomed)
        path.rename(doomed)
        _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
