"""MaxSim of queries against chunks: one interface, a plain reference and a kernel, over keys of three precisions.

Score of a chunk (paper, eq. 2): the largest inner product of its routing key with the query's tokens, over the number
of heads. Keys come as float32, bfloat16, or int8 with one scale a chunk. The invariant: what is rounded is part of the
definition, not of a back end. Keys are rounded once, when they are stored; beside bfloat16 and int8 keys the query is
rounded to bfloat16; products of those are exact in float32, where all sums are taken. So back ends differ by the order
of a sum alone, and float32 keys score exactly as `routing.document_scores` does.

Shapes: X routing tokens of all queries, Q queries, C chunks, D documents, R router width, H query heads.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from msa_train.errors import UserError
from msa_train.pack import TensorFields

Precision = Literal["float32", "bfloat16", "int8"]
Backend = Literal["auto", "torch", "triton"]

DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
MAGNITUDE = 0x7FFFFFFF  # of a float's bits, all but the sign
ABSENT = -0x7F800000  # the ordinal of -inf
LARGEST_INT8 = 127  # -128 stays unused, so that a vector and its negative are stored alike


@dataclass(frozen=True)
class RoutingKeys(TensorFields):
    """Routing keys k^ of chunks as they are stored.

    Args:
        vector_CR: float32, bfloat16 or int8.
        scale_C: What each int8 vector is to be multiplied with, float32; None for the others.
    """

    vector_CR: Tensor
    scale_C: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.vector_CR.dtype in DTYPES.values(), self.vector_CR.dtype
        assert (self.scale_C is not None) == (self.vector_CR.dtype == torch.int8), "int8 keys alone have scales"
        assert self.scale_C is None or self.scale_C.shape == self.vector_CR.shape[:1]

    @staticmethod
    def of(key_CR: Tensor, precision: Precision) -> RoutingKeys:
        """Rounds keys for storage.

        int8 takes the largest entry of a vector to 127:

        >>> keys = RoutingKeys.of(torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0]]), "int8")
        >>> keys.vector_CR.tolist(), (keys.scale_C * 127).tolist()
        ([[64, -127, 32], [0, 0, 0]], [1.0, 0.0])

        Args:
            key_CR: k^, float32.
            precision: What to store.
        """
        if precision != "int8":
            return RoutingKeys(key_CR.to(DTYPES[precision]))
        scale_C = key_CR.abs().amax(1) / LARGEST_INT8
        divisor_C = scale_C.clamp_min(torch.finfo(torch.float32).tiny)  # a vector of zeros stays one
        return RoutingKeys((key_CR / divisor_C[:, None]).round().to(torch.int8), scale_C)

    @property
    def precision(self) -> Precision:
        """What the vectors are stored as."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.vector_CR.dtype)

    def __len__(self) -> int:
        return len(self.vector_CR)

    def rows(self, start: int, stop: int) -> RoutingKeys:
        """Chunks `start .. stop`, without a copy."""
        return RoutingKeys(self.vector_CR[start:stop], None if self.scale_C is None else self.scale_C[start:stop])

    def floats(self) -> Tensor:
        """The vectors that the stored ones stand for. [C, R], float32."""
        vector_CR = self.vector_CR.float()
        return vector_CR if self.scale_C is None else vector_CR.mul_(self.scale_C[:, None])

    @staticmethod
    def bytes_per_chunk(width: int, precision: Precision) -> int:
        """Bytes that one chunk takes.

        >>> [RoutingKeys.bytes_per_chunk(1024, precision) for precision in ("float32", "bfloat16", "int8")]
        [4096, 2048, 1028]
        """
        return width * DTYPES[precision].itemsize + (torch.float32.itemsize if precision == "int8" else 0)


def chunk_scores(
    query_XR: Tensor, offsets_Q: Tensor, keys: RoutingKeys, heads: int, backend: Backend = "auto"
) -> Tensor:
    """The largest score of each chunk over each query's tokens.

    With tokens (1, 0) and (0, 2) of one query and (1, 1) of another, chunks (3, 0) and (1, -1), and 2 heads:

    >>> query, keys = torch.tensor([[1.0, 0], [0, 2], [1, 1]]), RoutingKeys(torch.tensor([[3.0, 0], [1, -1]]))
    >>> chunk_scores(query, torch.tensor([0, 2, 3]), keys, heads=2)
    tensor([[1.5000, 0.5000],
            [1.5000, 0.0000]])

    Args:
        query_XR: q~ of the routing tokens, query after query, float32.
        offsets_Q: Where each query's tokens begin, Q + 1 values, int64; every query has at least one.
        keys: Routing keys of C chunks, on the same device.
        heads: H, the divisor of the mean.
        backend: `triton` is the kernel (CUDA, bfloat16 or int8 keys, a width that 16 divides), `torch` plain PyTorch
            anywhere; `auto` takes the kernel where it can run.

    Returns:
        [Q, C], float32.

    Raises:
        UserError: The kernel was asked for and cannot run here.
    """
    if not _kernel_runs(query_XR, keys, backend):
        return _reference(query_XR, offsets_Q, keys, heads)
    from msa_train.kernels.maxsim_triton import max_sim

    score_QC = torch.empty(len(offsets_Q) - 1, len(keys), dtype=torch.float32, device=query_XR.device)
    max_sim(query_XR, offsets_Q, keys.vector_CR, keys.scale_C, heads, score_QC)
    return score_QC


def document_ordinals(
    query_XR: Tensor,
    offsets_Q: Tensor,
    keys: RoutingKeys,
    document_C: Tensor,
    documents: int,
    heads: int,
    backend: Backend = "auto",
) -> Tensor:
    """Ordinals of documents, each by the best of its chunks; the kernel never writes scores of chunks.

    Args:
        query_XR: As in `chunk_scores`.
        offsets_Q: As there.
        keys: As there.
        document_C: The document of each chunk, below `documents`, int64.
        documents: D.
        heads: As there.
        backend: As there.

    Returns:
        [Q, D], int32; ABSENT where a document has no chunks.

    Raises:
        UserError: The kernel was asked for and cannot run here.
    """
    shape, device = (len(offsets_Q) - 1, documents), query_XR.device
    if not _kernel_runs(query_XR, keys, backend):
        score_QC = _reference(query_XR, offsets_Q, keys, heads)
        # the start is -inf, not 0: an absent score of 0 would beat every negative cosine
        lowest_QD = torch.full(shape, -torch.inf, dtype=torch.float32, device=device)
        return ordinals(lowest_QD.scatter_reduce_(1, document_C.expand_as(score_QC), score_QC, "amax"))
    from msa_train.kernels.maxsim_triton import max_sim

    ordinal_QD = torch.full(shape, ABSENT, dtype=torch.int32, device=device)
    max_sim(query_XR, offsets_Q, keys.vector_CR, keys.scale_C, heads, ordinal_QD, document_C)
    return ordinal_QD


def ordinals(score: Tensor) -> Tensor:
    """Integers that sort as scores do.

    A float is a sign and, below it, a magnitude that sorts as an integer does. So an ordinal is the magnitude with
    that sign, and -0.0 and 0.0 are one. The magnitude of 1.0 is 0x3f800000, that of infinity 0x7f800000:

    >>> [hex(value) for value in ordinals(torch.tensor([1.0, 0.0, -0.0, -1.0, -torch.inf])).tolist()]
    ['0x3f800000', '0x0', '0x0', '-0x3f800000', '-0x7f800000']

    Args:
        score: float32.
    """
    bits = score.view(torch.int32)
    return torch.where(bits < 0, -(bits & MAGNITUDE), bits)


def scores(ordinal: Tensor) -> Tensor:
    """What `ordinals` were made of.

    >>> scores(ordinals(torch.tensor([1.0, 0.0, -1.0, -torch.inf]))).tolist()
    [1.0, 0.0, -1.0, -inf]
    """
    return torch.where(ordinal < 0, -ordinal | ~MAGNITUDE, ordinal).view(torch.float32)


def _kernel_runs(query_XR: Tensor, keys: RoutingKeys, backend: Backend) -> bool:
    hindrance = _hindrance(query_XR, keys) if backend != "torch" else None
    if backend == "triton" and hindrance:
        raise UserError(f"search: back end 'triton' {hindrance}; use 'torch' or 'auto'")
    return backend != "torch" and hindrance is None


def _hindrance(query_XR: Tensor, keys: RoutingKeys) -> str | None:
    """Why the kernel cannot run, or None if it can."""
    if not (query_XR.is_cuda and keys.vector_CR.is_cuda):
        return f"needs queries and keys on CUDA, they are on {query_XR.device} and {keys.vector_CR.device}"
    if keys.precision == "float32":
        return "needs bfloat16 or int8 keys, they are float32"
    if query_XR.shape[1] % 16:
        return f"needs a router width that 16 divides, it is {query_XR.shape[1]}"
    if importlib.util.find_spec("triton") is None:
        return "needs the triton package (pip install triton)"
    return None


def _reference(query_XR: Tensor, offsets_Q: Tensor, keys: RoutingKeys, heads: int) -> Tensor:
    if keys.precision != "float32":
        query_XR = query_XR.bfloat16().float()
    with torch.autocast(query_XR.device.type, enabled=False):
        score_XC = query_XR @ keys.vector_CR.float().T
    if keys.scale_C is not None:
        score_XC *= keys.scale_C
    score_XC /= heads
    return torch.segment_reduce(score_XC, "max", offsets=offsets_Q, axis=0, unsafe=True)
