"""MSAConfig: what makes a decoder a memory-sparse one (paper, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msa_train.errors import UserError

RouterInit = Literal["aligned", "random"]


@dataclass(frozen=True)
class MSAConfig:
    """Sizes and choices of the routed memory. The defaults are the publication's, but for `router_init`.

    Args:
        chunk_size: Tokens mean-pooled into one latent (P). A document's last chunk may be shorter.
        top_k: Documents selected per query and routed layer; fewer documents than this are all selected.
            The active context's positions start after `top_k` as well, so changing it shifts what was trained.
        routed_layers: Layers that read the memory; empty means the upper half of the decoder.
        router_init: `aligned` starts both routers from the same random projection, so that the untrained score is a
            similarity of hidden states; `random` draws them independently (the publication's start).
    """

    chunk_size: int = 64
    top_k: int = 16
    routed_layers: tuple[int, ...] = ()
    router_init: RouterInit = "aligned"

    def __post_init__(self) -> None:
        object.__setattr__(self, "routed_layers", tuple(self.routed_layers))
        problems = []
        if self.chunk_size < 1:
            problems.append(f"chunk_size is {self.chunk_size}: give at least 1 token per chunk (the paper: 64)")
        if self.top_k < 1:
            problems.append(f"top_k is {self.top_k}: select at least 1 document (the paper: 16)")
        if list(self.routed_layers) != sorted(set(self.routed_layers)) or min(self.routed_layers, default=0) < 0:
            problems.append(
                f"routed_layers is {list(self.routed_layers)}: give layer numbers from 0, ascending, each once"
            )
        if problems:
            raise UserError("msa: " + "; ".join(problems))

    def layers_of(self, decoder_layers: int) -> tuple[int, ...]:
        """Routed layers of a decoder with `decoder_layers` layers.

        >>> MSAConfig().layers_of(5)
        (2, 3, 4)

        Raises:
            UserError: A routed layer lies beyond the decoder.
        """
        layers = self.routed_layers or tuple(range(decoder_layers // 2, decoder_layers))
        if layers[-1] >= decoder_layers:
            raise UserError(
                f"msa.routed_layers names layer {layers[-1]}, but the decoder has layers 0..{decoder_layers - 1}"
            )
        return layers
