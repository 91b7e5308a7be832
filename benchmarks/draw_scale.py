"""The figure of docs/performance.md: seconds over tokens on a GPU, from results/qwen3_4b_bench.json.

python benchmarks/draw_scale.py
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Draws."""
    rows = json.loads((ROOT / "benchmarks/results/qwen3_4b_bench.json").read_text())["lengths"]["rows"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, column, label in (
        ("dense", "whole_model_s", "dense attention (SDPA)"),
        ("documents", "median_s", "memory-sparse, recompute documents"),
        ("layers", "median_s", "memory-sparse, recompute layers"),
    ):
        points = [(row["tokens"], row[name][column]) for row in rows if column in row[name]]
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    ticks = [row["tokens"] for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tokens // 1024}K" for tokens in ticks])
    axes.set(xlabel="tokens of a pack", ylabel="seconds, forward + backward")
    axes.set_title("Qwen3-4B on one H200, 80 GiB of it used", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(ROOT / "docs/gpu_scaling.png", dpi=130)


if __name__ == "__main__":
    main()
