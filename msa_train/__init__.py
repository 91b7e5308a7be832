"""msa-train: training for Memory Sparse Attention (arXiv 2603.23516)."""

__version__ = "0.1.0"
