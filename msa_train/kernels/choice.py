"""Which implementation serves each step of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from msa_train.kernels import elementwise, pool, rope, varlen


@dataclass(frozen=True)
class Kernels:
    """Implementations, each with a plain reference; `auto` takes the fastest that can run.

    Args:
        attention: Attention within sequences: `torch` (torch.nn.attention.varlen), `flash` (flash-attn), `sdpa`.
        elementwise: Norms, residuals, SwiGLU: `compiled` (torch.compile) or `plain`.
        rope: Head norms with rotary positions: `triton` or `torch`.
        pool: Chunk means: `triton` or `torch`.
    """

    attention: varlen.Backend = "auto"
    elementwise: elementwise.Choice = "auto"
    rope: rope.Backend = "auto"
    pool: pool.Backend = "auto"


REFERENCE = Kernels("sdpa", "plain", "torch", "torch")
