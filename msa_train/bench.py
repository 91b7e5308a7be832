"""The bench: what a training step takes on the GPU that is there, from random weights and random packs.

Times are wall-clock seconds of forward and backward between two synchronisations, after a warm-up; each measurement
frees what the one before it held. A ratio is only ever formed within one run on one card. The invariant: what is timed
is the library's own model, loss and pack, nothing simplified.

Shapes: T document tokens, Q queries.
"""

from __future__ import annotations

import gc
import math
import platform
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from msa_train.backbone import open_config
from msa_train.config import MSAConfig
from msa_train.errors import UserError
from msa_train.kernels.choice import REFERENCE, Kernels
from msa_train.losses import routing_loss
from msa_train.model import MemorySparseModel, Recompute
from msa_train.operations import ModelSizes, PackSizes, training_operations
from msa_train.pack import Context, Contexts, Documents, MemoryPack

GIB = 2**30
LARGEST = 24  # kernels that a profile names
KINDS = (  # of GPU kernels by how a part of their names begins, the first that fits
    ("attention", r"flash|fmha"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|splitk"),
    ("head norms and RoPE", r"^_turn"),
    ("chunk means", r"^_mean|^_spread|segment_reduce"),
    ("compiled norms, residuals, SwiGLU", r"^triton"),
)


@dataclass(frozen=True)
class Load:
    """A random pack.

    Args:
        document_tokens: T, about; documents are whole.
        shortest: Tokens of the shortest document.
        longest: Tokens of the longest.
        queries: Q.
        question: Tokens of a question, all of which route.
        answer: Labelled tokens of an answer.
    """

    document_tokens: int = 65_536
    shortest: int = 64
    longest: int = 512
    queries: int = 1
    question: int = 24
    answer: int = 8

    def pack(self, chunk_size: int, vocabulary: int) -> MemoryPack:
        """The pack; the same for the same load. Query q is answered by document q."""
        draw = torch.Generator().manual_seed(self.document_tokens)
        lengths: list[int] = []
        while (left := self.document_tokens - sum(lengths)) > 0:
            drawn = int(torch.randint(self.shortest, self.longest + 1, (), generator=draw))
            lengths.append(min(drawn, left))
        ids = [torch.randint(10, vocabulary, (length,), generator=draw).tolist() for length in lengths]
        labelled, size = [False] * self.question + [True] * self.answer, (self.question + self.answer,)
        asked = [
            Context(torch.randint(10, vocabulary, size, generator=draw).tolist(), labelled, [(0, self.question)])
            for _ in range(self.queries)
        ]
        contexts = Contexts.build([1, 2, 3], asked)
        positive_QD = torch.zeros(self.queries, len(lengths), dtype=torch.bool)
        positive_QD[torch.arange(self.queries), torch.arange(self.queries) % len(lengths)] = True
        return MemoryPack(
            Documents.build(ids, chunk_size),
            contexts,
            positive_QD,
            torch.zeros_like(positive_QD),
            tuple(map(str, range(len(lengths)))),
            tuple(map(str, range(self.queries))),
            asked=self.queries,
            step_labels=self.queries * self.answer,
            step_queries=self.queries,
        )


class Bench:
    """One model of random weights on one device, and what it takes.

    Args:
        backbone: A config.json, or the folder or name of a model whose shape to take.
        msa: The memory's sizes.
        limit_gib: The memory that the card is to be taken for, if it has more.
        device: Where; on a CPU memory is not measured.

    Raises:
        UserError: There is no GPU, or the backbone cannot be opened.
    """

    def __init__(
        self,
        backbone: str,
        msa: MSAConfig = MSAConfig(),
        limit_gib: float | None = None,
        device: Literal["cuda", "cpu"] = "cuda",
    ) -> None:
        self.gpu, self.device = device == "cuda", device
        if self.gpu and not torch.cuda.is_available():
            raise UserError("bench measures a GPU, and torch sees none; `msa-train estimate` foresees it without one")
        if self.gpu:
            self.total_gib = torch.cuda.get_device_properties(0).total_memory / GIB
            self.limit_gib = min(limit_gib or self.total_gib, self.total_gib)
            torch.cuda.set_per_process_memory_fraction(self.limit_gib / self.total_gib)
        config = open_config(backbone)
        with torch.device(device):
            torch.manual_seed(0)
            decoder = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            self.model = MemorySparseModel(decoder, msa).train()
        self.sizes = ModelSizes.of(self.model)

    def environment(self) -> dict[str, Any]:
        """What the numbers hold for."""
        told: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
        if self.gpu:
            told |= {
                "gpu": torch.cuda.get_device_name(0),
                "cuda": torch.version.cuda,
                "memory_gib": round(self.total_gib, 1),
                "memory_limit_gib": round(self.limit_gib, 1),
            }
        return told

    def configure(
        self,
        recompute: Recompute = "layers",
        kept_layers: int = 0,
        kernels: Kernels = Kernels(),
        trains_backbone: bool = True,
    ) -> None:
        """How the model is to compute from now on."""
        for _, weight in self.model.backbone_parameters():
            weight.requires_grad_(trains_backbone)
        self.trains_backbone = trains_backbone
        self.model.recompute, self.model.kept_layers = recompute, kept_layers
        self.model.use(kernels)

    def training(self, load: Load, repeats: int = 3) -> dict[str, Any]:
        """Forward and backward of one pack.

        Args:
            load: The pack.
            repeats: Timed passes, after one that is not.
        """
        pack = load.pack(self.model.config.chunk_size, self.sizes.vocabulary).to(self.device)
        times, peak = self._timed(lambda: self._losses(pack).backward(), repeats)
        seconds = statistics.median(times)
        sizes = PackSizes.of(pack, self.model.config.chunk_size, self.model.config.top_k)
        operations = training_operations(self.sizes, sizes, self.trains_backbone)
        return {
            **asdict(load),
            "documents": pack.documents.chunks.documents,
            "recompute": self.model.recompute,
            "kept_layers": self.model.kept_layers,
            "kernels": asdict(self.model.kernels),
            "trains_backbone": self.trains_backbone,
            "seconds": times,
            "median_s": seconds,
            "tokens_per_s": pack.tokens / seconds,
            "queries_per_s": load.queries / seconds,
            "model_tflops": operations / seconds / 1e12,
            "peak_gib": peak,
        }

    def dense(self, tokens: int, layers: int, repeats: int = 1) -> dict[str, Any]:
        """The same decoder with dense attention over the same number of tokens, transformers' own layers with SDPA,
        forward and backward with recomputation.

        Args:
            tokens: Tokens of the one sequence.
            layers: How many of the decoder's layers run; all cost alike.
            repeats: Timed passes.
        """
        decoder: Any = self.model.backbone.model
        draw = torch.Generator().manual_seed(tokens)
        ids = torch.randint(10, self.sizes.vocabulary, (1, tokens), generator=draw).to(self.device)
        position = torch.arange(tokens, device=self.device)[None]

        def step() -> None:
            hidden = decoder.embed_tokens(ids)
            rope = decoder.rotary_emb(hidden, position)
            for layer in decoder.layers[:layers]:
                hidden = checkpoint(layer, hidden, position_embeddings=rope, use_reentrant=False)
            hidden[:, -1].float().sum().backward()

        times, peak = self._timed(step, repeats, warm_up=repeats > 1)
        return {
            "tokens": tokens, "layers": layers, "seconds": times,
            "whole_model_s": statistics.median(times) * len(decoder.layers) / layers, "peak_gib": peak,
        }  # fmt: skip

    def profile(self, load: Load) -> dict[str, Any]:
        """Milliseconds of one forward and backward by kind of GPU kernel, and the largest."""
        pack = load.pack(self.model.config.chunk_size, self.sizes.vocabulary).to(self.device)
        self._timed(lambda: self._losses(pack).backward(), 1)
        activity = torch.profiler.ProfilerActivity.CUDA if self.gpu else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profiler:
            self._losses(pack).backward()
            self._wait()
        self._clear()
        kinds: dict[str, float] = defaultdict(float)
        column = "self_device_time_total" if self.gpu else "self_cpu_time_total"
        kernels = [(event.key, getattr(event, column) / 1000) for event in profiler.key_averages()]
        for name, took in kernels:
            kinds[kind_of(name)] += took
        largest = sorted(kernels, key=lambda pair: -pair[1])[:LARGEST]
        return {
            "ms": dict(sorted(kinds.items(), key=lambda pair: -pair[1])),
            "largest": [{"kernel": name[:120], "ms": took} for name, took in largest],
        }

    def _losses(self, pack: MemoryPack) -> Tensor:
        output = self.model(pack)
        routing = routing_loss(output.doc_score_LQD, pack.positive_QD).mean()
        return routing + (self.model.label_loss(output, pack.contexts) if self.trains_backbone else 0)

    def _timed(self, work: Callable[[], None], repeats: int, warm_up: bool = True) -> tuple[list[float], float]:
        self._clear()
        times = []
        for number in range(repeats + warm_up):
            self._wait()
            started = time.perf_counter()
            work()
            self._wait()
            if number >= warm_up:
                times.append(time.perf_counter() - started)
            self.model.zero_grad()
        peak = torch.cuda.max_memory_allocated() / GIB if self.gpu else math.nan
        self._clear()
        return times, peak

    def _wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def _clear(self) -> None:
        self.model.zero_grad()
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def kind_of(kernel: str) -> str:
    """The kind of a GPU kernel, by its name.

    >>> kind_of("_turn_back"), kind_of("void at::native::vectorized_elementwise_kernel<4>")
    ('head norms and RoPE', 'other')
    """
    return next((kind for kind, names in KINDS if re.search(names, kernel.lower())), "other")


def step(bench: Bench, load: Load, say: Callable[[str], None]) -> dict[str, Any]:
    """All that is fast against none of it, both with recomputation as in training, and where the time goes."""
    rows = []
    ways: tuple[tuple[str, Recompute, int, Kernels], ...] = (
        ("fast", "layers", 0, Kernels()),
        ("fast, 4 layers kept", "layers", 4, Kernels()),
        ("fast, 6 layers kept", "layers", 6, Kernels()),
        ("fast, by documents", "documents", 0, Kernels()),
        ("plain norms, RoPE, SwiGLU and means", "layers", 0, replace(REFERENCE, attention="auto")),
    )
    for name, recompute, kept, kernels in ways:
        bench.configure(recompute, kept, kernels)
        rows.append({"name": name, **_unless_full(partial(bench.training, load))})
        say(_line(name, rows[-1]))
    bench.configure("layers")
    told = bench.profile(load)
    for kind, took in told["ms"].items():
        say(f"  {took:8.1f} ms  {kind}")
    return {"rows": rows, "profile": told, "plain_over_fast": rows[-1].get("median_s", 0) / rows[0]["median_s"]}


def lengths(bench: Bench, load: Load, say: Callable[[str], None]) -> dict[str, Any]:
    """Cost over the memory's length, beside dense attention's in a few of the layers."""
    rows = []
    for tokens in LENGTHS:
        row: dict[str, Any] = {"tokens": tokens}
        ways: tuple[Recompute, ...] = ("layers", "documents")
        for recompute in ways:
            bench.configure(recompute)
            row[recompute] = _unless_full(partial(bench.training, replace(load, document_tokens=tokens), 2))
            say(_line(f"{tokens:,} tokens, {recompute}", row[recompute]))
        row["dense"] = _unless_full(partial(bench.dense, tokens, DENSE_LAYERS))
        say(_line(f"{tokens:,} tokens, dense", row["dense"]))
        rows.append(row)
    return {"rows": rows}


def queries(bench: Bench, load: Load, say: Callable[[str], None]) -> dict[str, Any]:
    """What further queries of one memory cost."""
    bench.configure("layers")
    rows = []
    for count in QUERIES:
        rows.append(bench.training(replace(load, queries=count)))
        say(_line(f"{count} queries", rows[-1]) + f"  {rows[-1]['queries_per_s']:.2f} queries/s")
    return {"rows": rows, "queries_per_s_last_over_first": rows[-1]["queries_per_s"] / rows[0]["queries_per_s"]}


def routers(bench: Bench, load: Load, say: Callable[[str], None]) -> dict[str, Any]:
    """Routers alone trained, the backbone frozen."""
    bench.configure("none", trains_backbone=False)
    rows = []
    for tokens in ROUTERS:
        rows.append(bench.training(replace(load, document_tokens=tokens)))
        say(_line(f"{tokens:,} tokens, routers alone", rows[-1]))
    return {"rows": rows}


LENGTHS, DENSE_LAYERS = (16_384, 32_768, 65_536, 131_072, 262_144), 4
QUERIES, ROUTERS = (1, 4, 16, 64), (8192, 65_536)
MEASURES = {"step": step, "lengths": lengths, "queries": queries, "routers": routers}


def _line(name: str, found: dict[str, Any]) -> str:
    if "out_of_memory" in found:
        return f"{name:40} out of memory"
    seconds = found.get("median_s") or found["whole_model_s"]
    return f"{name:40} {seconds:7.3f} s  {found['peak_gib']:6.2f} GiB"


def _unless_full(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measure()
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return {"out_of_memory": True}
