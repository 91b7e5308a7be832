"""AdamW's state by the names of weights: what a checkpoint keeps of it, whatever shared it out over how many ranks.

    moment/NAME, square/NAME   AdamW's two moments, of the weight's shape
    master/NAME                the weight in float32, where training has a float32 copy of bfloat16 weights

The invariant: steps and complete tensors by name alone are kept. So a run goes on under another strategy, and with
another number of ranks, with the very numbers that it was saved with; which groups there are, and their rates, betas
and weight decay, are those of the run that goes on. Under DeepSpeed tensors are asked for, and given back, by its own
functions for that, weight by weight: no rank ever holds all of them twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = {"moment": "exp_avg", "square": "exp_avg_sq"}
MASTER = "master"

Read = Callable[[str], Tensor | None]


# --- a plain optimiser --------------------------------------------------------------------------------------------


def plain_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an optimiser's `state_dict` says, by name.

    Args:
        state: The `state_dict` of an optimiser that was given names.

    Returns:
        Tensors by the names above; and steps by weight.
    """
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    tensors, steps = {}, {}
    for number, values in state["state"].items():
        name = names[number]
        steps[name] = float(values["step"])
        for key, theirs in MOMENTS.items():
            tensors[f"{key}/{name}"] = values[theirs]
    return tensors, {"steps": steps}


def plain_state_dict(read: Read, kept: Mapping[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse: an optimiser's `state_dict`. A weight that was not trained before has no state yet.

    Args:
        read: A tensor by its name above; None where there is none.
        kept: Steps, as `plain_state` returns them.
        groups: This run's, as its optimiser has them.
    """
    states: dict[int, dict[str, Tensor]] = {}
    for number, name in enumerate(name for group in groups for name in group["param_names"]):
        found = {theirs: read(f"{key}/{name}") for key, theirs in MOMENTS.items()}
        if name in kept["steps"] and all(tensor is not None for tensor in found.values()):
            states[number] = {"step": torch.tensor(kept["steps"][name]), **found}  # type: ignore[dict-item]
    numbers = itertools.count()
    made = [{**group, "params": [next(numbers) for _ in group["param_names"]]} for group in groups]
    return {"state": states, "param_groups": made}


# --- DeepSpeed's --------------------------------------------------------------------------------------------------


def zero_state(module: nn.Module, engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that an engine's optimiser holds, complete, one at a time. All ranks must go through all of them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    stepped = any("step" in state for state in engine.optimizer.optimizer.state.values())
    if stepped:
        _link(engine.optimizer)
    for name, weight in module.named_parameters():
        if not weight.requires_grad:
            continue
        yield f"{MASTER}/{name}", safe_get_full_fp32_param(weight)
        for key, theirs in MOMENTS.items() if stepped else ():
            yield f"{key}/{name}", safe_get_full_optimizer_state(weight, theirs)


def zero_steps(module: nn.Module, engine: Any) -> dict[str, Any]:
    """Steps by weight."""
    optimizer = engine.optimizer.optimizer
    taken = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert len(taken) < 2, "ZeRO steps all weights together"
    names = [name for name, weight in module.named_parameters() if weight.requires_grad]
    return {"steps": dict.fromkeys(names, taken.pop()) if taken else {}}


def restore_zero_state(module: nn.Module, engine: Any, read: Read, kept: Mapping[str, Any]) -> None:
    """Gives an engine's optimiser what a checkpoint kept.

    Args:
        module: Whose weights.
        engine: DeepSpeed's.
        read: A tensor by its name above; None where there is none.
        kept: Steps. ZeRO steps all weights together, so those that were not trained before take over the others' count.
    """
    optimizer, base = engine.optimizer, engine.optimizer.optimizer
    if kept["steps"]:
        steps = max(kept["steps"].values())
        for flat in _flats(optimizer):
            state = {theirs: torch.zeros_like(flat) for theirs in MOMENTS.values()}
            base.state[flat] = {"step": torch.tensor(steps, device=flat.device), **state}
        _link(optimizer)
    for name, weight in module.named_parameters():
        if not weight.requires_grad:
            continue
        master = read(f"{MASTER}/{name}")
        _give(weight, master if master is not None else read(name), None)
        for key, theirs in MOMENTS.items() if kept["steps"] else ():
            _give(weight, read(f"{key}/{name}"), theirs)


def _flats(optimizer: Any) -> list[Tensor]:
    """A rank's parts of all weights, in float32, as each of DeepSpeed's optimisers calls them."""
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    return next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))


def _link(optimizer: Any) -> None:
    """Stages 1 and 2 tie weights to their moments at the first step; those that are there now need it now."""
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _give(weight: Any, value: Tensor | None, key: str | None) -> None:
    if value is None:  # a weight that was not trained before keeps what it has: its own value, and no moments
        return
    from deepspeed import utils

    value = value.float()
    if hasattr(weight, "ds_id"):
        part, rank = weight.ds_tensor.numel(), torch.distributed.get_rank()
        room = part * torch.distributed.get_world_size() - value.numel()
        value = nn.functional.pad(value.flatten(), (0, room)).narrow(0, part * rank, part)
        give = utils.safe_set_local_fp32_param if key is None else utils.safe_set_local_optimizer_state
    else:
        give = utils.safe_set_full_fp32_param if key is None else utils.safe_set_full_optimizer_state
    give(weight, value) if key is None else give(weight, value, key)
