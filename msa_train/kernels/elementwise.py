"""Norms, residuals and the gated activation: work that memory bandwidth bounds, one pass each.

Run eagerly, each of these reads and writes the states several times over. So each is one plain PyTorch function, and
its fast form is that same function compiled: the reference is the source, and there is nothing to keep equal by hand.
The invariant: compiled and plain differ by rounding alone. Eagerly every step rounds to the states' precision, compiled
the last one does.

Shapes: T tokens of a stream (a dynamic size: packs differ in length), M model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Choice = Literal["auto", "compiled", "plain"]

GRAPHS = 64  # per function: with gradients or without, one token or many, frozen weights or not, of every precision


def rms_norm(states: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32, as Llama and Qwen have it.

    Args:
        states: [T, M].
        weight: M values.
        eps: Added to the mean square.
        dtype: What to round the result to; by default it is what the product gives.
    """
    single = states.float()
    unit = single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + eps)
    normed = weight * unit.to(states.dtype)
    return normed if dtype is None else normed.to(dtype)


def add_norm(
    states: Tensor, added: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The residual sum, and its norm."""
    total = states + added
    return total, rms_norm(total, weight, eps, dtype)


def gate(gate_TM: Tensor, up_TM: Tensor) -> Tensor:
    """SwiGLU's product."""
    return F.silu(gate_TM) * up_TM


def run(choice: Choice, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls one of the functions above.

    Args:
        choice: `plain` as it stands, `compiled` by torch.compile, `auto` compiled on CUDA and plain elsewhere.
        function: Which.
        arguments: Its arguments. The first dimension of tensors that have several is the tokens'.
    """
    if choice == "plain" or (choice == "auto" and not arguments[0].is_cuda):
        return function(*arguments)
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.ndim > 1:
            torch._dynamo.maybe_mark_dynamic(argument, 0)
    return _compiled(function)(*arguments)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    return torch.compile(function, fullgraph=True)


def take_over(norm: Any, choice: Choice) -> None:
    """Gives a decoder's RMSNorm module the passes of this file.

    They stay behind the module's own call, where ZeRO-3 gathers its weight:

        norm(states)           as before
        norm(states, added=x)  -> add_norm

    Under autocast the norm is rounded here, once, to what the layers behind it would each round it to.

    Args:
        norm: Module with `weight` and `variance_epsilon`.
        choice: As in `run`.
    """
    norm.forward = functools.partial(_normalise, norm, choice)


def _normalise(norm: Any, choice: Choice, states: Tensor, *, added: Tensor | None = None) -> Any:
    device, dtype = states.device.type, None
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if added is not None:
        return run(choice, add_norm, states, added, norm.weight, norm.variance_epsilon, dtype)
    return run(choice, rms_norm, states, norm.weight, norm.variance_epsilon, dtype)
