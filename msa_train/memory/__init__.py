"""The memory bank: documents encoded once, kept, searched, changed, saved and sharded."""

from msa_train.memory.bank import MemoryBank
from msa_train.memory.blocks import Tiers
from msa_train.memory.encoding import Encoder, Size
from msa_train.memory.layer import BankLayer, BanksLayer, Recalled
from msa_train.memory.parallel import ParallelBank, serve_all
from msa_train.memory.segment import BankShape, Passage
from msa_train.memory.storage import BankFolder

__all__ = [
    "BankFolder",
    "BankLayer",
    "BankShape",
    "BanksLayer",
    "Encoder",
    "MemoryBank",
    "ParallelBank",
    "Passage",
    "Recalled",
    "Size",
    "Tiers",
    "serve_all",
]
