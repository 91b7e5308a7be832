"""Where packs come from: corpora, tokenizers, packing, loaders."""

from datamodules.packed_memory import PackedMemory

__all__ = ["PackedMemory"]
