"""MaxSim as one kernel: a matrix product whose tiles are reduced over the query's tokens before they leave the chip.

A program takes BLOCK_C chunks and one query. It walks the width in steps of BLOCK_K, chunks times tokens into a
float32 accumulator, and keeps a running maximum over the query's blocks of tokens, so nothing of size [tokens, chunks]
reaches memory and the keys are read once. Chunks are the left operand, for that one may come from registers: int8 keys
become bfloat16 there, exactly, and never exist as bfloat16 in memory.
The invariant: no masks within the product. A block past a query's end repeats its last token, which changes no
maximum; rows past the last chunk are zeros, whose scores are not written.

Shapes: X routing tokens of all queries, Q queries, C chunks, D documents, R router width.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from triton.tools.tensor_descriptor import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    TensorDescriptor,
)

# chunks, widest step, warps, stages: on an H100 these read keys at 101% and 93% of a copy's bandwidth, and they fit
# into 99 KiB of shared memory, the least that a GPU with bfloat16 has
BLOCKS = {torch.bfloat16: (64, 128, 4, 3), torch.int8: (128, 64, 4, 4)}
RUN = 64  # entries that are permuted among themselves beside int8 keys


def max_sim(
    query_XR: Tensor,
    offsets_Q: Tensor,
    vector_CR: Tensor,
    scale_C: Tensor | None,
    heads: int,
    out: Tensor,
    document_C: Tensor | None = None,
) -> None:
    """Scores of chunks or documents on CUDA.

    Args:
        query_XR: Routing queries, float32.
        offsets_Q: Where each query's tokens begin, Q + 1 values, int64.
        vector_CR: Routing keys, bfloat16 or int8.
        scale_C: Scales of int8 keys, float32.
        heads: The divisor of the mean.
        out: Where to put scores of chunks [Q, C], float32; or, with `document_C`, ordinals of documents [Q, D], int32,
            which are raised to those of their chunks.
        document_C: The document of each chunk, int64.
    """
    queries, (chunks, width) = len(offsets_Q) - 1, vector_CR.shape
    block_c, block_k, warps, stages = BLOCKS[vector_CR.dtype]
    # lengths lie on the device; their mean is known here, and a longer query takes several blocks
    block_x = min(max(triton.next_power_of_2(triton.cdiv(len(query_XR), queries)), 16), 64)
    runs = vector_CR.dtype == torch.int8 and width % RUN == 0
    if runs:
        query_XR = query_XR.reshape(-1, width // RUN, 4, 4, 2, 2).permute(0, 1, 3, 4, 2, 5)
    query_XR = query_XR.to(torch.bfloat16, memory_format=torch.contiguous_format)
    if not chunks:
        return
    block_k = min(block_k, width & -width)
    vectors = TensorDescriptor.from_tensor(vector_CR.contiguous(), [block_c, block_k])
    with torch.cuda.device(vector_CR.device):
        _max_sim[(triton.cdiv(chunks, block_c) * queries,)](
            query_XR, offsets_Q, vectors, scale_C, document_C, out,
            queries, chunks, 1 / heads, out.stride(0), R=width, RUNS=runs,
            BLOCK_C=block_c, BLOCK_X=block_x, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip


# a tile's place in a larger tensor must not compile it again
@triton.jit(
    do_not_specialize=["queries", "chunks", "stride"],
    do_not_specialize_on_alignment=["offset_ptr", "scale_ptr", "document_ptr", "out_ptr"],
)
def _max_sim(
    query_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    vector_CR: tl.tensor_descriptor,
    scale_ptr: tl.tensor,
    document_ptr: tl.tensor,
    out_ptr: tl.tensor,
    queries: tl.tensor,
    chunks: tl.tensor,
    share: tl.tensor,
    stride: tl.tensor,
    R: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # queries of one tile run side by side, so that all but the first find its keys in the cache
    tile, query = tl.program_id(0) // queries, tl.program_id(0) % queries
    first, stop = tl.load(offset_ptr + query).to(tl.int32), tl.load(offset_ptr + query + 1).to(tl.int32)
    chunk_C = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    real_C = chunk_C < chunks
    step_K = tl.arange(0, BLOCK_K)
    best_C = tl.full([BLOCK_C], float("-inf"), tl.float32)
    for start in range(first, stop, BLOCK_X):
        token_X = tl.minimum(start + tl.arange(0, BLOCK_X), stop - 1)
        query_KX = query_ptr + token_X[None, :] * R + step_K[:, None]
        product_CX = tl.zeros([BLOCK_C, BLOCK_X], tl.float32)
        for k in range(0, R, BLOCK_K):
            vector_CK = vector_CR.load([tile * BLOCK_C, k])
            if RUNS:
                # The left operand wants entries 2t, 2t+1, 2t+8, 2t+9 of every 16 in thread t of four: reads of two
                # bytes. A sum takes any order, so a thread gets 16 bytes in a row, and the query is permuted alike.
                vector_CK = vector_CK.reshape(BLOCK_C, BLOCK_K // 64, 4, 4, 2, 2).permute(0, 1, 3, 4, 2, 5)
                vector_CK = vector_CK.reshape(BLOCK_C, BLOCK_K)
            product_CX = tl.dot(vector_CK.to(tl.bfloat16), tl.load(query_KX + k), product_CX)
        best_C = tl.maximum(best_C, tl.max(product_CX, 1))
    if scale_ptr is not None:
        best_C *= tl.load(scale_ptr + chunk_C, mask=real_C, other=0.0)
    score_C = best_C * share  # as PyTorch divides by a number on CUDA
    row_ptr = out_ptr + query.to(tl.int64) * stride
    if document_ptr is None:
        tl.store(row_ptr + chunk_C, score_C, mask=real_C)
    else:
        document_C = tl.load(document_ptr + chunk_C, mask=real_C, other=0)
        bits_C = score_C.to(tl.int32, bitcast=True)
        ordinal_C = tl.where(bits_C < 0, -(bits_C & 0x7FFFFFFF), bits_C)  # maxsim.ordinals
        tl.atomic_max(row_ptr + document_C, ordinal_C, mask=real_C, sem="relaxed")
