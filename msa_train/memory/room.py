"""Room: whether a bank fits on a disk or a GPU, asked before anything is written there."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from msa_train.errors import UserError
from msa_train.memory.blocks import Tiers
from msa_train.memory.segment import BankShape


def check_room(folder: Path, needed: int) -> None:
    """Refuses to write what does not fit on the disk.

    Args:
        folder: Where it is to be written.
        needed: Bytes.

    Raises:
        UserError: With both figures.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{folder}: the bank takes {gib(needed)}, {gib(free)} are free there: give another disk, "
            "or routing keys in int8"
        )


def check_room_on(device: torch.device, tiers: Tiers, shape: BankShape, chunks: int) -> None:
    """Refuses a bank that does not fit on a GPU.

    Args:
        device: Where queries will come from.
        tiers: Where the bank is to be kept.
        shape: Its sizes.
        chunks: Its chunks.

    Raises:
        UserError: With both figures.
    """
    if device.type != "cuda":
        return
    needed = shape.key_bytes(chunks) if tiers.router_keys == "device" else 0
    needed += shape.value_bytes(chunks) if tiers.values == "device" else 0
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        raise UserError(
            f"the bank takes {gib(needed)} of GPU memory, {gib(free)} are free: keep its routing keys in int8, or in "
            "host memory (Tiers), or share it over several GPUs"
        )


def gib(size: int) -> str:
    """Bytes as people read them.

    >>> gib(57_600_000_000), gib(2_400_000)
    ('53.6 GiB', '2.3 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
