"""What a search of the memory bank costs as the memory grows, beside its bound and the published way.

    python benchmarks/search.py                 # measures on one GPU, writes results/search.json, table and figure
    python benchmarks/search.py --draw          # table and figure from the JSON alone
    python benchmarks/search.py --quick         # tiny sizes, anywhere, into a temporary folder

Random keys at Qwen3-4B's sizes: one query of 64 routing tokens over all 18 routed layers, one after another, 16
documents each. The bound is the time to read the keys once at the bandwidth that a device-to-device copy reaches
here. The published way is its inference code's scoring in plain torch operations: keys repeated to all heads and
normalised for every query, a product [heads, tokens, chunks], mean, maximum, top-k. Where its intermediates do not fit
beside the keys of all layers, it is given one layer's keys, 18 times.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from msa_train.kernels.maxsim import DTYPES, Backend, Precision, RoutingKeys
from msa_train.routing import routing_query
from msa_train.search import Found, Tile, search

ROOT = Path(__file__).parent.parent
PRECISIONS: tuple[Precision, ...] = ("bfloat16", "int8")


@dataclass(frozen=True)
class Sizes:
    """What is searched. Tokens of memory come in chunks of 64, documents have 1 to 8 chunks."""

    memories: tuple[int, ...] = (1_000_000, 4_000_000, 16_000_000, 32_000_000, 64_000_000, 100_000_000)
    layers: int = 18
    heads: int = 32
    groups: int = 8
    head_width: int = 128
    query: int = 64
    k: int = 16
    chunk: int = 64
    tile: int = 2**20
    repeats: int = 15
    copied: int = 2**32

    @property
    def width(self) -> int:
        """R."""
        return self.groups * self.head_width


QUICK = Sizes((10_000, 40_000), 2, 8, 2, 16, 5, 4, tile=256, repeats=3, copied=2**22)


class Layout:
    """Documents of 1 to 8 chunks, and tiles of at most so many chunks, cut at documents."""

    def __init__(self, chunks: int, tile: int, device: str) -> None:
        count_D = torch.randint(1, 9, (chunks,), generator=torch.Generator().manual_seed(chunks))
        stop_D = count_D.cumsum(0)
        stop_D = torch.cat([stop_D[stop_D < chunks], torch.tensor([chunks])])
        self.documents, self.chunks = len(stop_D), chunks
        document_C = torch.repeat_interleave(torch.arange(len(stop_D)), stop_D.diff(prepend=torch.zeros(1).long()))
        self.document_C = document_C.to(device)
        self.parts: list[tuple[int, int, Tensor, Tensor]] = []
        first, start = 0, 0
        while start < chunks:
            last = int(torch.searchsorted(stop_D, start + tile, right=True))
            stop = int(stop_D[last - 1])
            number_D = torch.arange(first, last) + 1
            self.parts.append((start, stop, (document_C[start:stop] - first).to(device), number_D.to(device)))
            first, start = last, stop

    def tiles(self, keys: RoutingKeys) -> Iterator[Tile]:
        """The keys, cut."""
        for start, stop, document_C, number_D in self.parts:
            yield Tile(keys.rows(start, stop), document_C, number_D)


def draw_keys(chunks: int, sizes: Sizes, precision: Precision, device: str) -> RoutingKeys:
    """Keys about as long as unit vectors a head, drawn in place: 58 GB leave no room for a float32 copy."""
    vector_CR = torch.empty(chunks, sizes.width, dtype=DTYPES[precision], device=device)
    if precision != "int8":
        return RoutingKeys(vector_CR.normal_(0, sizes.head_width**-0.5))
    scale_C = torch.rand(chunks, device=device).add_(1.0).mul_(1e-3)
    return RoutingKeys(vector_CR.random_(-127, 128), scale_C)


def published(key_CGW: Tensor, query_XHW: Tensor, document_C: Tensor, documents: int, k: int) -> Tensor:
    """The published scoring of one layer; numbers of the k best documents."""
    heads, groups = query_XHW.shape[1], key_CGW.shape[1]
    key_CHW = F.normalize(key_CGW.repeat_interleave(heads // groups, 1), dim=-1)
    query_HXW = F.normalize(query_XHW, dim=-1).transpose(0, 1)
    score_C = torch.matmul(query_HXW, key_CHW.permute(1, 2, 0)).mean(0).amax(0)
    score_D = score_C.new_full((documents,), -torch.inf).scatter_reduce_(0, document_C, score_C, "amax")
    return torch.topk(score_D, k).indices


def seconds(work: Callable[[], Any], repeats: int, device: str) -> list[float]:
    """Wall-clock seconds of each repeat, device work included, after a warm-up."""
    taken = []
    for _ in range(repeats + 2):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return taken[2:]


def bandwidth(elements: int, device: str) -> float:
    """Bytes read and written a second by a copy of a bf16 tensor."""
    source = torch.randn(2**20, device=device).bfloat16().repeat(elements // 2**20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(seconds(lambda: target.copy_(source), 9, device))


def agreement(sizes: Sizes, precision: Precision, device: str, backend: Backend) -> dict[str, Any]:
    """The back end beside the reference on a small bank."""
    layout = Layout(20_000, 4096, device)
    keys = draw_keys(layout.chunks, sizes, precision, device)
    query_XHW = torch.randn(sizes.query, sizes.heads, sizes.head_width, device=device)
    query_XR, offsets_Q = routing_query(query_XHW, sizes.groups), _offsets(sizes.query, device)
    ours, theirs = (
        search(layout.tiles(keys), query_XR, offsets_Q, sizes.heads, sizes.k, backend=name)
        for name in (backend, "torch")
    )
    return {
        "precision": precision,
        "chunks": layout.chunks,
        "same_documents": torch.equal(ours.number_QK, theirs.number_QK),
        "largest_difference": float((ours.score_QK - theirs.score_QK).abs().max()),
        "largest_score": float(theirs.score_QK.max()),
    }


def measure_one(tokens: int, precision: Precision, sizes: Sizes, device: str, backend: Backend) -> dict[str, Any]:
    """One memory in one precision; beside bf16 keys, the published way over the same."""
    layout = Layout(tokens // sizes.chunk, sizes.tile, device)
    queries = [
        torch.randn(sizes.query, sizes.heads, sizes.head_width, device=device).bfloat16() for _ in range(sizes.layers)
    ]
    query_LXR = [routing_query(query, sizes.groups) for query in queries]
    offsets_Q = _offsets(sizes.query, device)
    row: dict[str, Any] = {
        "tokens": tokens,
        "chunks": layout.chunks,
        "documents": layout.documents,
        "tiles": len(layout.parts),
        "precision": precision,
        "bytes": sizes.layers * layout.chunks * RoutingKeys.bytes_per_chunk(sizes.width, precision),
    }
    try:
        keys_L = [draw_keys(layout.chunks, sizes, precision, device) for _ in range(sizes.layers)]
    except torch.OutOfMemoryError:
        return {**row, "search_s": None}

    def ours() -> list[Found]:
        return [
            search(layout.tiles(keys), query_XR, offsets_Q, sizes.heads, sizes.k, backend=backend)
            for keys, query_XR in zip(keys_L, query_LXR, strict=True)
        ]

    row["search_s"] = seconds(ours, sizes.repeats, device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ours()
        row["extra_bytes"] = torch.cuda.max_memory_allocated() - before
    if precision != "bfloat16":
        return row

    def theirs() -> None:
        for layer, query in enumerate(queries):
            key_CGW = keys_L[layer % len(keys_L)].vector_CR.unflatten(1, (sizes.groups, -1))
            published(key_CGW, query, layout.document_C, layout.documents, sizes.k)

    for held in ("all layers", "one layer"):
        try:
            row["published_s"] = seconds(theirs, 3, device)
            return {**row, "published_keys": held}
        except torch.OutOfMemoryError:
            del keys_L[1:]  # and once more, with room for its intermediates
            torch.cuda.empty_cache()
    return {**row, "published_s": None}


def measure(sizes: Sizes, device: str) -> dict[str, Any]:
    """All memories in both precisions."""
    torch.manual_seed(0)
    backend: Backend = "triton" if device == "cuda" else "torch"
    result = {
        "what": f"one query of {sizes.query} routing tokens, {sizes.layers} layers one after another, width "
        f"{sizes.width}, {sizes.heads} heads, {sizes.k} documents each; seconds of each repeat",
        "machine": _machine(device),
        "sizes": vars(sizes),
        "bytes_per_s": bandwidth(sizes.copied, device),
        "agreement": [agreement(sizes, precision, device, backend) for precision in PRECISIONS],
        "rows": [],
    }
    cases = [(tokens, precision) for tokens in sizes.memories for precision in PRECISIONS]
    for tokens, precision in track(cases, description="measuring"):
        if device == "cuda":
            torch.cuda.empty_cache()
        result["rows"].append(measure_one(tokens, precision, sizes, device, backend))
    return result


def draw(result: dict[str, Any], figure_file: Path) -> None:
    """The figure, then the table for docs/performance.md."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [
        "| tokens | chunks | keys | GB | search, ms | bound, ms | of the bound | published, ms | ratio | extra, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in result["rows"]:
        precision, tokens = row["precision"], row["tokens"]
        cells = [f"{tokens / 1e6:g}M", f"{row['chunks']:,}", precision, f"{row['bytes'] / 1e9:.1f}"]
        if row["search_s"] is None:
            lines.append(f"| {' | '.join(cells)} | out of memory | | | | | |")
            continue
        ours, bound = statistics.median(row["search_s"]), row["bytes"] / result["bytes_per_s"]
        curves.setdefault(f"search, {precision} keys", []).append((tokens, ours))
        curves.setdefault(f"bound, {precision} keys", []).append((tokens, bound))
        cells += [f"{1e3 * ours:.2f}", f"{1e3 * bound:.2f}", f"{bound / ours:.0%}"]
        if row.get("published_s"):
            theirs = statistics.median(row["published_s"])
            curves.setdefault("published way, bfloat16 keys", []).append((tokens, theirs))
            cells += [
                f"{1e3 * theirs:.1f}{'' if row['published_keys'] == 'all layers' else ' *'}",
                f"{theirs / ours:.1f}",
            ]
        else:
            cells += ["out of memory" if "published_s" in row else "", ""]
        cells.append(f"{row['extra_bytes'] / 2**20:.1f}" if "extra_bytes" in row else "")
        lines.append(f"| {' | '.join(cells)} |")

    colours = {"search, bfloat16": "#08519c", "search, int8": "#31a354", "published": "#fd8d3c"}
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, points in curves.items():
        bound = name.startswith("bound")
        alike = name.replace("bound", "search")
        colour = next(value for start, value in colours.items() if alike.startswith(start))
        axes.plot(*zip(*points, strict=True), "--" if bound else "o-", color=colour, label=name, lw=1 if bound else 1.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    memories = sorted({row["tokens"] for row in result["rows"]})
    axes.set_xticks(memories, [f"{tokens / 1e6:g}M" for tokens in memories])
    axes.minorticks_off()
    title = f"Searching all {result['sizes']['layers']} layers, {result['machine']['device']}"
    axes.set(xlabel="tokens of memory", ylabel="seconds a query", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    figure.savefig(figure_file, dpi=120)

    print(f"{result['machine']['device']}, a copy moves {result['bytes_per_s'] / 1e12:.2f} TB/s")
    for row in result["agreement"]:
        verdict = "the same documents" if row["same_documents"] else "OTHER DOCUMENTS"
        print(f"{row['precision']}: {verdict} as the reference, scores within {row['largest_difference']:.1e}")
    print("* given one layer's keys 18 times: its intermediates do not fit beside those of all layers")
    print("\n".join(lines))


def _offsets(tokens: int, device: str) -> Tensor:
    return torch.tensor([0, tokens], device=device)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _machine(device: str) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if device != "cuda":
        return {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), **versions}
    import triton

    memory = torch.cuda.get_device_properties(0).total_memory
    cuda = {"cuda": torch.version.cuda, "triton": triton.__version__, "memory_gib": round(memory / 2**30, 1)}
    return {"device": torch.cuda.get_device_name(), **cuda, **versions}


def main() -> None:
    """Measures and draws, or draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="no measuring: table and figure from the JSON")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, help="a folder for JSON and figure, instead of results/ and docs/")
    given = parser.parse_args()
    out = Path(tempfile.mkdtemp(prefix="search-")) if given.quick and given.out is None else given.out
    result_file = (out or ROOT / "benchmarks" / "results") / "search.json"
    if not given.draw:
        result = measure(QUICK, "cpu") if given.quick else measure(Sizes(), "cuda")
        result_file.write_text(json.dumps(result, indent=1) + "\n")
    draw(json.loads(result_file.read_text()), (out or ROOT / "docs") / "search.png")


if __name__ == "__main__":
    main()
